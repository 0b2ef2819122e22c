"""Do the checkpoint's tensors agree with what its config.json promises? Also its identity. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from remora_build.checkpoint.safetensors_file import FLOATS, TensorEntry
from remora_build.families.naming import Naming
from remora_contract.decoder import DecoderSpec
from remora_contract.digests import digest_document
from remora_contract.errors import CheckpointInvalid, Unsupported

# Old Llama checkpoints store this table, which follows from the configuration.
_DERIVED = re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Inventory:
    """`tensors` are all that is exported; `tied_copy` repeats the embedding and must equal it;
    `left_out` are a multimodal model's other tensors."""

    naming: Naming
    tensors: dict[str, TensorEntry]
    tied_copy: TensorEntry | None
    left_out: tuple[str, ...] = ()


def take_inventory(
    naming: Naming,
    entries: Mapping[str, TensorEntry],
    left_out: tuple[str, ...] = (),
    *,
    stored: Collection[str] = (),
    instead: Mapping[str, TensorEntry] | None = None,
) -> Inventory:
    """`left_out`: beginnings of the names of tensors that are not the decoder's. Of a quantized
    checkpoint the tensors `stored` are not there, and `instead` is, checked by whoever found it.

    Raises CheckpointInvalid or Unsupported naming the first tensor that is missing, misshapen, not
    of floats or unexpected."""
    spec, codes = naming.spec, instead or {}
    expected = {name: s for name, s in naming.tensors().items() if name not in stored}
    for name, shape in expected.items():
        if name not in entries:
            raise CheckpointInvalid(
                f"the checkpoint lacks {name} {list(shape)}{_misnamed(name, entries)}"
            )
        _check_shape(entries[name], shape)
    tied_copy = entries.get(naming.head) if spec.tied_embeddings else None
    if tied_copy is not None:
        _check_shape(tied_copy, expected[naming.embedding])
    known = {*expected, naming.head} if tied_copy is not None else set(expected)
    for name, entry in entries.items():
        expected_here = name in known or name in codes or name.startswith(left_out)
        if not expected_here and not _is_derived(naming, name):
            raise CheckpointInvalid(
                f"{entry.path} holds {name[:120]} {list(entry.shape)}, which a {spec.family} model "
                "of this config.json does not have: it would be dropped silently"
            )
    others = tuple(sorted(name for name in entries if name.startswith(left_out)))
    tensors = {n: entries[n] for n in expected} | dict(codes)
    return Inventory(naming, tensors, tied_copy, others)


def _is_derived(naming: Naming, name: str) -> bool:
    return _DERIVED.fullmatch(name.removeprefix(naming.place.prefix)) is not None


def _misnamed(name: str, entries: Mapping[str, TensorEntry]) -> str:
    """What it may have instead: other classes of transformers save under other prefixes."""
    stem = name.removeprefix("model.")
    found = next((e for e in entries if e == stem or e.endswith(f".{stem}")), None)
    return (
        f"; it has {found[:120]}: load it as AutoModelForCausalLM and save_pretrained it"
        if found
        else ""
    )


def _check_shape(entry: TensorEntry, shape: tuple[int, ...]) -> None:
    if entry.dtype not in FLOATS:
        raise Unsupported(
            f"{entry.path}: {entry.name} is {entry.dtype}, where {', '.join(sorted(FLOATS))} is "
            "read; export the original checkpoint"
        )
    if entry.shape != shape:
        raise CheckpointInvalid(
            f"{entry.path}: {entry.name} has shape {list(entry.shape)}; "
            f"config.json asks for {list(shape)}"
        )


def check_tied(naming: Naming, copy: TensorEntry, digests: Mapping[str, str]) -> None:
    """Raises CheckpointInvalid when config.json ties what the checkpoint keeps apart."""
    if digests[copy.name] != digests[naming.embedding]:
        raise CheckpointInvalid(
            f"{copy.path}: config.json says tie_word_embeddings, but {naming.head} differs "
            f"from {naming.embedding}; set it to false if the model has a head of its own"
        )


def base_digest(
    spec: DecoderSpec, tensors: Mapping[str, TensorEntry], digests: Mapping[str, str]
) -> str:
    """Identity of the checkpoint's architecture and weights, whatever the sharding."""
    listed = [
        {"name": n, "dtype": e.dtype, "shape": list(e.shape), "digest": digests[n]}
        for n, e in sorted(tensors.items())
    ]
    return digest_document({"decoder": spec, "tensors": listed})
