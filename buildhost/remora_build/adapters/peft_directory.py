"""The two files of a PEFT adapter: adapter_config.json, and its tensors in whichever form they are.

Owns which file is read; what they say is `settings` and `bound`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from remora_build.adapters.pickled import PickledWeights
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


Weights = PeftWeights | PickledWeights


def open_weights(peft_dir: Path) -> Weights:
    """As PEFT does: safetensors where there are both. Raises AdapterInvalid, Unsupported."""
    if (peft_dir / PEFT_WEIGHTS).exists():
        return PeftWeights(peft_dir / PEFT_WEIGHTS)
    if (peft_dir / PICKLED_WEIGHTS).exists():
        return PickledWeights(peft_dir / PICKLED_WEIGHTS)
    raise AdapterInvalid(
        f"{peft_dir} has neither {PEFT_WEIGHTS} nor {PICKLED_WEIGHTS}: "
        "is it a PEFT adapter directory?"
    )
