"""A checkpoint directory: its documents (bounded) and the tensors of all its shards.

Owns file names and the shard index; knows no model. Nothing outside the directory is opened by
name (a file itself may be a symbolic link, as in the Hugging Face cache).
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from remora_build.checkpoint.safetensors_file import (
    FLOATS,
    SourceDtype,
    TensorEntry,
    check_file,
    is_file,
    read_entries,
)
from remora_contract.errors import CheckpointInvalid, Unsupported

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_MAX_DOCUMENT_BYTES = 64 << 20
_MAX_SHARDS = 4096


def check_directory(directory: Path) -> None:
    """Raises CheckpointInvalid, saying what the directory is instead."""
    if not directory.is_dir():
        raise CheckpointInvalid(f"{directory} is no directory; give a downloaded checkpoint's")
    if (directory / CONFIG).is_file():
        return
    if (directory / "adapter_config.json").is_file():
        raise CheckpointInvalid(
            f"{directory} is a PEFT adapter, not a checkpoint: use remora-build adapter"
        )
    raise CheckpointInvalid(f"{directory} is no checkpoint: it has no {CONFIG}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of at most 64 MiB. Raises CheckpointInvalid."""
    check_file(path)
    try:
        if path.stat().st_size > _MAX_DOCUMENT_BYTES:
            raise CheckpointInvalid(f"{path}: larger than {_MAX_DOCUMENT_BYTES} bytes")
        data = json.loads(path.read_bytes())
    except OSError as e:
        raise CheckpointInvalid(f"{path} cannot be read: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise CheckpointInvalid(f"{path}: not valid JSON: {e}") from e
    if not isinstance(data, dict):
        raise CheckpointInvalid(f"{path}: must be a JSON object")
    return data


def find_tensors(
    directory: Path, dtypes: Collection[SourceDtype] = FLOATS
) -> dict[str, TensorEntry]:
    """Every tensor of the checkpoint by name; a dtype that is not among `dtypes` is refused.

    Raises CheckpointInvalid, Unsupported.
    """
    if is_file(directory / SINGLE_FILE):
        return read_entries(directory / SINGLE_FILE, dtypes)
    if is_file(directory / INDEX_FILE):
        return _read_shards(directory, _weight_map(directory / INDEX_FILE), dtypes)
    if any(directory.glob("*.bin")) or any(directory.glob("*.pth")):
        raise Unsupported(
            f"{directory} holds pickled weights only; save it again with "
            "save_pretrained(..., safe_serialization=True)"
        )
    raise CheckpointInvalid(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}")


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointInvalid(f"{path}: has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain(name):
            raise CheckpointInvalid(
                f"{path}: {tensor[:120]} lies in {str(name)[:120]!r}, "
                "which is no safetensors file of this directory"
            )
    if len(set(weight_map.values())) > _MAX_SHARDS:
        raise CheckpointInvalid(f"{path}: names more than {_MAX_SHARDS} shards")
    return weight_map


def _is_plain(name: str) -> bool:
    unsafe = "/" in name or "\\" in name or "\0" in name or name.startswith(".")
    return name.endswith(".safetensors") and not unsafe


def _read_shards(
    directory: Path, weight_map: dict[str, str], dtypes: Collection[SourceDtype]
) -> dict[str, TensorEntry]:
    files = sorted(set(weight_map.values()))
    shards = {name: read_entries(directory / name, dtypes) for name in files}
    for tensor, name in weight_map.items():
        if tensor not in shards[name]:
            raise CheckpointInvalid(f"{directory / name} lacks {tensor}; the index puts it there")
    for name, entries in shards.items():
        for tensor in entries:
            if weight_map.get(tensor) != name:
                raise CheckpointInvalid(
                    f"{directory / name} holds {tensor}, which the index does not put there"
                )
    return {tensor: shards[name][tensor] for tensor, name in weight_map.items()}
