"""The two files of a PEFT adapter: adapter_config.json, and its tensors in whichever form they are.

Owns which file is read; what they say is `settings` and `bound`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from remora_build.adapters.settings import LoraSettings, parse_settings, read_config
from remora_build.adapters.weights import PeftWeights
from remora_contract.errors import AdapterInvalid

CONFIG_FILE = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"


def read_settings(peft_dir: Path) -> tuple[LoraSettings, dict[str, Any]]:
    """The config, checked and as it stands. Raises Unsupported, AdapterInvalid, DocumentInvalid,
    ArtifactInvalid."""
    path = peft_dir / CONFIG_FILE
    config = read_config(path)
    return parse_settings(config, str(path)), config


def open_weights(peft_dir: Path) -> PeftWeights:
    """As PEFT does: safetensors where there are both. Raises AdapterInvalid, Unsupported."""
    for name in (PEFT_WEIGHTS, PICKLED_WEIGHTS):
        if (peft_dir / name).exists() or (peft_dir / name).is_symlink():
            return PeftWeights(peft_dir / name)
    raise AdapterInvalid(f"{peft_dir} has no {PEFT_WEIGHTS}: is it a PEFT adapter directory?")
