"""The formats an adapter comes in, the words of their options, how a directory shows which it is.

Knows no contents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from remora_contract.errors import AdapterInvalid, UsageWrong

SourceFormat = Literal["peft", "remora", "edgellm", "trtllm"]
TargetFormat = Literal["remora", "edgellm", "trtllm"]
ForeignFormat = Literal["edgellm", "trtllm"]
StoredDtype = Literal["float16", "bfloat16", "float32"]
GateUpOrder = Literal["up-gate", "gate-up"]  # of the halves of a fused mlp_gate_up

SOURCE_FORMATS: tuple[SourceFormat, ...] = get_args(SourceFormat)
TARGET_FORMATS: tuple[TargetFormat, ...] = get_args(TargetFormat)
STORED_DTYPES: tuple[StoredDtype, ...] = get_args(StoredDtype)

# A directory is of the format one of whose files it holds.
SIGNS: dict[SourceFormat, tuple[str, ...]] = {
    "peft": ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    "remora": ("adapter.json",),
    "edgellm": ("processed_adapter_model.safetensors",),
    "trtllm": ("model.lora_weights.npy", "model.lora_weights.0.npy"),
}


def detect(directory: Path) -> SourceFormat:
    """Raises AdapterInvalid when the directory shows no format, UsageWrong for several."""
    found = [f for f, names in SIGNS.items() if any((directory / n).exists() for n in names)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageWrong(
            f"{directory} looks like {' and '.join(found)}: say which with --from "
            f"{' or --from '.join(found)}"
        )
    signs = "; ".join(f"{f}: {' or '.join(names)}" for f, names in SIGNS.items())
    raise AdapterInvalid(f"{directory} is no adapter directory of a known format ({signs})")
