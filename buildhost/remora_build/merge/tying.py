"""A head that shares the embedding's tensor: does it still do so once merged? Pure.

The merged model must compute what base and adapter compute together. An adapter that changes only
one of the two, or each in its own way, parts them: the checkpoint then gets a head of its own and
`tie_word_embeddings: false`. (PEFT's merge_and_unload writes both changes into the shared tensor,
which is another function than the one that was trained.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from remora_build.merge.changes import Change, Changes
from remora_build.merge.selection import HEADS, INPUT_EMBEDDINGS, last_part
from remora_contract.errors import AdapterInvalid, Unsupported

TIE_FIELD = "tie_word_embeddings"


@dataclass(frozen=True)
class Tie:
    """Names of the two weights; `stored`: the checkpoint holds the head as a copy."""

    embedding: str
    head: str
    stored: bool


def find_tie(config: Mapping[str, Any], names: Iterable[str]) -> Tie | None:
    """None when head and embedding are apart, or are not recognised."""
    weights = [n for n in names if n.endswith(".weight")]
    embeddings = [n for n in weights if last_part(_module(n)) in INPUT_EMBEDDINGS]
    heads = [n for n in weights if last_part(_module(n)) in HEADS]
    said = _said(config)
    if len(embeddings) != 1 or len(heads) > 1 or said is False or (heads and not said):
        return None
    return Tie(embeddings[0], heads[0] if heads else _head_of(embeddings[0]), bool(heads))


def follow_tie(
    changes: Changes, tie: Tie, *, ensured: bool, same: Callable[[Change, Change], bool]
) -> dict[str, Change]:
    """One adapter's changes as its training had them: what the embedding does, a tied head does
    too with ensure_weight_tying, and its single tokens always, below a LoRA of the head's own.

    `same(embedding's, head's)` compares the saved tensors. Raises AdapterInvalid when they differ
    although ensured, Unsupported when the head has DoRA beside the embedding's tokens.
    """
    followed = _share_base(dict(changes), tie)
    embedding, head = followed.get(tie.embedding), followed.get(tie.head, Change())
    if embedding is None:
        return followed
    if ensured and _trains(head) and not same(embedding, head):
        raise AdapterInvalid(
            f"ensure_weight_tying is set, but what the adapter holds for {tie.head} and for "
            f"{tie.embedding} differs"
        )
    if embedding.rows and head.products:
        if head.magnitude is not None:
            raise Unsupported(
                f"{tie.head} has DoRA and shares the trained tokens of {tie.embedding}: its norms "
                "would be those of other rows; train the tokens without DoRA on the head"
            )
        followed[tie.head] = replace(head, rows=embedding.rows)
    only_tokens = embedding.rows and not embedding.products and not _trains(head)
    if only_tokens or (ensured and _scales(head) in ([], _scales(embedding))):
        followed[tie.head] = embedding
    return followed


def _scales(change: Change) -> list[float]:
    """alpha_pattern may name one of the two alone: then they have the same factors and differ."""
    return [product.scale for product in change.products]


def parts(changes: Changes, tie: Tie) -> bool:
    """Do head and embedding differ once merged?"""
    return changes.get(tie.embedding) != changes.get(tie.head)


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model whose head is its own."""
    untied = {**config, TIE_FIELD: False}
    text = config.get("text_config")
    if isinstance(text, dict) and TIE_FIELD in text:
        untied["text_config"] = {**text, TIE_FIELD: False}
    return untied


def _share_base(changes: dict[str, Change], tie: Tie) -> dict[str, Change]:
    """A copy of the shared base weight, saved beside one of the two, is the base of both."""
    for one, other in ((tie.embedding, tie.head), (tie.head, tie.embedding)):
        base = changes.get(one, Change()).base
        there = changes.get(other, Change())
        if base is not None and not base.trained and there.base is None:
            changes[other] = replace(there, base=base)
    return changes


def _trains(change: Change) -> bool:
    trained = change.base is not None and change.base.trained
    return trained or bool(change.products or change.rows)


def _said(config: Mapping[str, Any]) -> bool | None:
    text = config.get("text_config")
    for document in (config, text if isinstance(text, dict) else {}):
        if isinstance(document.get(TIE_FIELD), bool):
            return bool(document[TIE_FIELD])
    return None


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _head_of(embedding: str) -> str:
    around = "language_model." if embedding.startswith("language_model.") else ""
    head = "embed_out" if last_part(_module(embedding)) == "embed_in" else "lm_head"
    return f"{around}{head}.weight"
