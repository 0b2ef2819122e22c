"""Model families: config.json -> DecoderSpec. A family is one small file listed here."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from remora_build.checkpoint.directory import CONFIG, check_directory, read_json
from remora_build.families import llama, qwen2, qwen3
from remora_build.families.fields import ConfigFields
from remora_contract.bundle import DecoderSpec
from remora_contract.errors import CheckpointInvalid, Unsupported

FAMILIES: dict[str, Callable[[ConfigFields], DecoderSpec]] = {
    family.MODEL_TYPE: family.read for family in (llama, qwen2, qwen3)
}


def read_config(directory: Path) -> DecoderSpec:
    """The decoder a checkpoint directory describes. Raises CheckpointInvalid, Unsupported."""
    check_directory(directory)
    path = directory / CONFIG
    data = read_json(path)
    model_type = data.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointInvalid(f"{path}: has no model_type")
    if model_type not in FAMILIES:
        raise Unsupported(_unknown(path, model_type))
    return FAMILIES[model_type](ConfigFields(data, str(path)))


def _unknown(path: Path, model_type: str) -> str:
    near = difflib.get_close_matches(model_type, FAMILIES, n=1, cutoff=0.5)
    hint = f"; the nearest is {near[0]!r}, which computes differently" if near else ""
    known = ", ".join(FAMILIES)
    return f"{path}: model_type {model_type[:80]!r} is not supported (supported: {known}){hint}"
