"""Which converted adapter a path of `available_lora_weights` means. Adapters in other forms are
refused with the command that converts them.
"""

from __future__ import annotations

from pathlib import Path

from remora_contract.adapter import ADAPTER_JSON
from remora_contract.errors import AdapterInvalid

_EDGE_LLM_WEIGHTS = "processed_adapter_model.safetensors"
_PEFT_CONFIG = "adapter_config.json"


def adapter_directory(name: str, path: Path, bundle: Path) -> Path:
    """The sidecar directory, also when a file in it is named. Raises AdapterInvalid."""
    directory = path if path.is_dir() else path.parent
    if path.exists() and (directory / ADAPTER_JSON).is_file():
        return directory
    where = f"available_lora_weights: {name}: {path}"
    if not path.exists():
        raise AdapterInvalid(f"{where} does not exist")
    if (directory / _PEFT_CONFIG).is_file():
        raise AdapterInvalid(
            f"{where} is a PEFT adapter; convert it: "
            f"remora-build adapter {directory} OUT --base {bundle}"
        )
    if path.name == _EDGE_LLM_WEIGHTS or (directory / _EDGE_LLM_WEIGHTS).is_file():
        raise AdapterInvalid(
            f"{where} was made by tensorrt-edgellm-process-lora; convert the PEFT adapter it came "
            f"from: remora-build adapter PEFT_DIR OUT --base {bundle}"
        )
    raise AdapterInvalid(
        f"{where} holds no adapter; give a directory made by "
        f"remora-build adapter PEFT_DIR OUT --base {bundle}"
    )
