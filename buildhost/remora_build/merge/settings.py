"""adapter_config.json -> MergeSettings: what `adapters.settings` reads, and what only merging does.

Owns modules_to_save and the fields of training methods; decides nothing about tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from remora_build.adapters.settings import LoraSettings, parse_settings
from remora_build.merge.fields import MERGED
from remora_contract.errors import AdapterInvalid
from remora_contract.strict import parse

MODULES_TO_SAVE = "modules_to_save"
_TRAINING_TENSORS = {"velora_config": "lora_velora_", "monteclora_config": "lora_monteclora_"}


@dataclass(frozen=True)
class MergeSettings:
    """What PEFT would apply. `training_tensors`: how the names begin of tensors that only training
    reads."""

    where: str
    lora: LoraSettings
    modules_to_save: tuple[str, ...]
    training_tensors: tuple[str, ...]


def parse_merge_settings(config: Mapping[str, Any], where: str) -> MergeSettings:
    """Raises Unsupported for a field that asks for what cannot be merged, AdapterInvalid or
    DocumentInvalid for a value PEFT itself could not use."""
    lora = parse_settings(config, where, MERGED)
    modules: tuple[str, ...] = parse(
        tuple[str, ...], config.get(MODULES_TO_SAVE) or [], f"{where}: {MODULES_TO_SAVE}"
    )
    if "" in modules:
        raise AdapterInvalid(f"{where}: {MODULES_TO_SAVE} holds an empty name, which fits all")
    return MergeSettings(
        where=where,
        lora=lora,
        modules_to_save=modules,
        training_tensors=tuple(t for f, t in _TRAINING_TENSORS.items() if config.get(f)),
    )
