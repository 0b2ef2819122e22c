"""Do the checkpoint's tensors agree with what its config.json promises? Also its identity. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from remora_build.checkpoint.safetensors_file import FLOATS, TensorEntry
from remora_build.families.naming import Naming
from remora_contract.bundle import DecoderSpec
from remora_contract.digests import digest_document
from remora_contract.errors import CheckpointInvalid, Unsupported

# Old Llama checkpoints store this table, which follows from the configuration.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Inventory:
    """`tensors` are all that is exported; `tied_copy` repeats the embedding and must equal it."""

    naming: Naming
    tensors: dict[str, TensorEntry]
    tied_copy: TensorEntry | None


def take_inventory(
    naming: Naming,
    entries: Mapping[str, TensorEntry],
    *,
    stored: Collection[str] = (),
    instead: Mapping[str, TensorEntry] | None = None,
) -> Inventory:
    """Of a quantized checkpoint the tensors `stored` are not there, and `instead` is, checked by
    whoever found it. Raises CheckpointInvalid or Unsupported naming the first tensor that is
    missing, misshapen, not of floats or unexpected."""
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
    for name, entry in entries.items():
        known = name in expected or name in codes or entry is tied_copy
        if not known and not _DERIVED.fullmatch(name):
            raise CheckpointInvalid(
                f"{entry.path} holds {name[:120]} {list(entry.shape)}, which a {spec.family} model "
                "of this config.json does not have: it would be dropped silently"
            )
    return Inventory(naming, {n: entries[n] for n in expected} | dict(codes), tied_copy)


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
