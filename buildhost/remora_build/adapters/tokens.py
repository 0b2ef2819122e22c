"""trainable_token_indices: rows of the embedding, and of a tied head, that the adapter replaces.

With E the table [vocab, hidden], a replaced row of token t is a change of rank 1:

    embed   E + onehot(t) (new - old)         A [vocab, T] one-hot, B [T, hidden] = new - old
    head    E' + (new - old)' onehot(t)'      A [hidden, T] = (new - old)', B [T, vocab] one-hot

Owns which tokens of which module, and that algebra. Pure.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from remora_build.adapters.bound import TokenRows
from remora_build.adapters.modules import ModuleTable
from remora_build.adapters.settings import LoraSettings
from remora_build.adapters.sidecar import Factor
from remora_build.adapters.tensor_names import Found
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import AdapterInvalid, Unsupported


def bind_tokens(
    settings: LoraSettings, table: ModuleTable, found: Found, decoder: DecoderSpec
) -> tuple[TokenRows, ...]:
    """Raises AdapterInvalid for rows that are missing, unasked for or of tokens that do not exist,
    Unsupported for a module that is neither embedding nor head."""
    wanted: dict[str, tuple[int, ...]] = {}
    for name, tokens in settings.tokens:
        module = _module(name, table)
        _check_ids(tokens, decoder)
        wanted[module] = tokens
    follows = _head_follows(wanted, table, decoder)
    if follows:  # PEFT keeps no rows of its own for it
        wanted.pop(table.head, None)
    rows: list[TokenRows] = []
    for module, tokens in sorted(wanted.items()):
        parts = found.get(module, {})
        if "tokens" not in parts:
            raise AdapterInvalid(
                f"the config trains tokens of {module} (trainable_token_indices), whose rows "
                f"are missing: {module}.token_adapter.trainable_tokens_delta"
            )
        if set(parts) & {"A", "embedding_A"}:
            raise AdapterInvalid(
                f"{module} has trained tokens beside a LoRA of its own, which PEFT itself does not "
                "load"
            )
        is_embedding = module == table.embedding
        if follows and "magnitude" in found.get(table.head, {}):
            raise Unsupported(
                f"{table.head} has DoRA, and shares the trained tokens of the embedding: its norms "
                "would be those of other rows; train the tokens without DoRA on the head"
            )
        rows.append(TokenRows("embed" if is_embedding else "head", tokens, parts["tokens"]))
        if is_embedding and follows:
            rows.append(TokenRows("head", tokens, parts["tokens"]))
    _check_asked_for(found, wanted)
    return tuple(rows)


def token_factor(rows: TokenRows, change: NDArray[np.float32], vocab: int) -> Factor:
    """`change` [tokens, hidden] = new - old."""
    onehot = np.zeros((vocab, len(rows.tokens)), np.float32)
    onehot[list(rows.tokens), np.arange(len(rows.tokens))] = 1
    if rows.projection == "embed":
        return Factor(onehot, change, 1.0)
    return Factor(change.T, onehot.T, 1.0)


def beside(lora: Factor, tokens: Factor) -> Factor:
    """A tied head with LoRA shares the embedding's tokens, as in PEFT: x (W + T) + x a b is one
    branch of both ranks."""
    a, b = np.concatenate([lora.a, tokens.a], 1), np.concatenate([lora.b, tokens.b], 0)
    return replace(lora, a=a, b=b)


def _module(name: str, table: ModuleTable) -> str:
    for module in (table.embedding, table.head):
        if name in ("", module) or module.endswith(f".{name}"):
            return module
    raise Unsupported(
        f"trainable_token_indices names {name[:80]!r}, which is neither the embedding nor the head"
    )


def _head_follows(
    wanted: dict[str, tuple[int, ...]], table: ModuleTable, decoder: DecoderSpec
) -> bool:
    """Whether the embedding's new rows are a tied head's too."""
    if not decoder.tied_embeddings or table.embedding not in wanted:
        return False
    return wanted.get(table.head, wanted[table.embedding]) == wanted[table.embedding]


def _check_ids(tokens: tuple[int, ...], decoder: DecoderSpec) -> None:
    if len(set(tokens)) != len(tokens):
        raise AdapterInvalid("trainable_token_indices names a token twice")
    if max(tokens) >= decoder.vocab:
        raise AdapterInvalid(
            f"trainable_token_indices names token {max(tokens)}, the base has {decoder.vocab}"
        )


def _check_asked_for(found: Found, wanted: dict[str, tuple[int, ...]]) -> None:
    for module, parts in found.items():
        if "tokens" in parts and module not in wanted:
            raise AdapterInvalid(
                f"tensor {parts['tokens'][:200]} holds trained tokens that the config "
                "(trainable_token_indices) does not name"
            )
