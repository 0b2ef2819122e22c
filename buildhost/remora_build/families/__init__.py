"""Model families: config.json -> DecoderSpec, and what its checkpoints and PEFT call the parts. A
family is one small file listed here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from remora_build.checkpoint.directory import CONFIG, check_directory, read_json
from remora_build.families import (
    gemma,
    gemma2,
    gemma3,
    glm,
    glm4,
    granite,
    llama,
    ministral,
    ministral3,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    smollm3,
    stablelm,
)
from remora_build.families.family import Family
from remora_build.families.fields import ConfigFields
from remora_build.families.kinds import drop_plain_layer_types
from remora_build.families.naming import NESTED_PLACES, PLACES, Naming
from remora_build.families.nearest import nearest
from remora_build.families.wrappers import WRAPPERS
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import CheckpointInvalid, Unsupported

MAX_EXPERT_MLPS = 1 << 16  # of all layers together

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        llama.FAMILY,
        mistral.FAMILY,
        ministral.FAMILY,
        ministral3.FAMILY,
        mixtral.FAMILY,
        qwen2.FAMILY,
        qwen2_moe.FAMILY,
        qwen3.FAMILY,
        qwen3_moe.FAMILY,
        gemma.FAMILY,
        gemma2.FAMILY,
        gemma3.FAMILY,
        phi3.FAMILY,
        smollm3.FAMILY,
        granite.FAMILY,
        olmo2.FAMILY,
        stablelm.FAMILY,
        glm.FAMILY,
        glm4.FAMILY,
    )
}


def read_config(directory: Path, *, quantized: bool = False) -> DecoderSpec:
    """The decoder a checkpoint directory describes; of a multimodal one the text part. A quantized
    checkpoint is refused unless `quantized`.

    Raises CheckpointInvalid, Unsupported.
    """
    path, model_type, data = _read(directory)
    wrapper = WRAPPERS.get(model_type)
    if wrapper is None and model_type not in FAMILIES:
        raise Unsupported(_unknown(path, model_type, data))
    if not quantized:
        _refuse_quantized(path, data)
    fields = ConfigFields(data, str(path))
    if wrapper is None:
        spec = FAMILIES[model_type].read(fields)
    else:
        family, text = wrapper.text_fields(fields)
        spec = FAMILIES[family].read(text)
        drop_plain_layer_types(text)
        text.finish()
    drop_plain_layer_types(fields)
    fields.finish()
    _check_experts(path, spec)
    return spec


def _check_experts(path: Path, spec: DecoderSpec) -> None:
    """Their names are made before any tensor is looked for."""
    count = spec.layers * spec.experts.count if spec.experts is not None else 0
    if count > MAX_EXPERT_MLPS:
        raise CheckpointInvalid(f"{path}: {count} experts in all layers; {MAX_EXPERT_MLPS} at most")


def left_out_of(directory: Path) -> tuple[str, ...]:
    """Beginnings of the names of tensors that are not the decoder's, in a multimodal checkpoint.

    Raises CheckpointInvalid.
    """
    wrapper = WRAPPERS.get(_read(directory)[1])
    return wrapper.left_out if wrapper else ()


def _read(directory: Path) -> tuple[Path, str, dict[str, Any]]:
    """config.json, its model_type and all of it."""
    check_directory(directory)
    path = directory / CONFIG
    data = read_json(path)
    model_type = data.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointInvalid(f"{path}: has no model_type")
    return path, model_type, data


def _refuse_quantized(path: Path, data: Mapping[str, Any]) -> None:
    for table in (data, data.get("text_config")):
        found = table.get("quantization_config") if isinstance(table, dict) else None
        if found:
            method = found.get("quant_method") if isinstance(found, dict) else found
            raise Unsupported(
                f"{path}: quantization_config is {str(method)[:80]!r}: only remora-build export "
                "reads quantized checkpoints; give the original one"
            )


def namings(spec: DecoderSpec) -> tuple[Naming, ...]:
    """Every naming in which checkpoints or adapters of this decoder are found, the usual one first.

    Raises Unsupported for a decoder of a family that this version does not know.
    """
    family = FAMILIES.get(spec.family)
    if family is None:
        raise Unsupported(f"family {spec.family[:80]!r} is not known to this version of remora")
    return tuple(Naming(spec, words, place) for place in PLACES for words in family.words)


def naming(spec: DecoderSpec, tensors: Collection[str] = ()) -> Naming:
    """The naming of the checkpoint that holds `tensors`: the one that names most of them, the
    usual one when none does. Inside a multimodal model a head that is there is the head, whatever
    the config says of tying: so do transformers, and such configs leave it to defaults."""
    found = max(namings(spec), key=lambda n: sum(name in tensors for name in n.tensors()))
    if found.place in NESTED_PLACES and found.head in tensors:
        return replace(found, spec=replace(spec, tied_embeddings=False))
    return found


def _unknown(path: Path, model_type: str, data: Mapping[str, Any]) -> str:
    shown, known = model_type[:80], ", ".join((*FAMILIES, *WRAPPERS))
    near = nearest(model_type, data, FAMILIES)
    return (
        f"{path}: model_type {shown!r} is not supported; the nearest is {near!r}, which computes "
        f"differently (supported: {known})"
    )
