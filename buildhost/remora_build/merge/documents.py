"""What a merged checkpoint holds beside its weights: the source's documents, carried as they were
but for a head that became its own, and remora_merge.json, which says what was merged.

Owns file names; no weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remora_build.checkpoint.directory import CONFIG, INDEX_FILE, SINGLE_FILE, read_json
from remora_build.checkpoint.safetensors_file import ITEM_BYTES, TensorEntry, is_file
from remora_build.merge.tying import untied_config
from remora_build.version import exporter_name
from remora_contract.digests import canonical_json
from remora_contract.errors import CheckpointInvalid

MERGE_JSON = "remora_merge.json"
_FORMAT_VERSION = 1
_TEMPLATES = "additional_chat_templates"
# Documents that a loaded model may need; weights in any other format stay behind.
_SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".py")
_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")
_MAX_FILE_BYTES = 256 << 20
_MAX_FILES = 1000


@dataclass(frozen=True)
class MergedAdapter:
    name: str
    digest: str
    weight: float


@dataclass(frozen=True)
class MergedFile:
    path: str
    bytes: int


@dataclass(frozen=True)
class MergeRecord:
    """remora_merge.json. `untied`: the head was the embedding's tensor and got its own."""

    format_version: int
    exporter: str
    adapters: tuple[MergedAdapter, ...]
    untied: bool
    files: tuple[MergedFile, ...]


def copy_documents(checkpoint: Path, out: Path) -> None:
    """Raises CheckpointInvalid for files of absurd size or number."""
    for count, source in enumerate(_documents(checkpoint)):
        if count >= _MAX_FILES or source.stat().st_size > _MAX_FILE_BYTES:
            raise CheckpointInvalid(
                f"{source}: more than {_MAX_FILES} files or {_MAX_FILE_BYTES} bytes beside weights"
            )
        target = out / source.relative_to(checkpoint)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)


def untie(checkpoint: Path, out: Path, head: TensorEntry | None) -> None:
    """Rewrites config.json, and the index for a head that was not stored before."""
    _write_json(out / CONFIG, untied_config(read_json(checkpoint / CONFIG)))
    if head is None or not (out / INDEX_FILE).exists():
        return
    index = read_json(checkpoint / INDEX_FILE)
    weight_map = {**index["weight_map"], head.name: head.path.name}
    index["weight_map"] = dict(sorted(weight_map.items()))
    metadata = index.get("metadata")
    if isinstance(metadata, dict):
        grown = {"total_size": head.bytes, "total_parameters": head.bytes // ITEM_BYTES[head.dtype]}
        for name, more in grown.items():
            if isinstance(metadata.get(name), int):
                metadata[name] += more
    _write_json(out / INDEX_FILE, index)


def write_record(out: Path, adapters: tuple[MergedAdapter, ...], *, untied: bool) -> MergeRecord:
    """Lists everything else in `out`, so that --force knows what it may replace."""
    files = sorted(p for p in out.rglob("*") if p.is_file())
    listed = tuple(MergedFile(p.relative_to(out).as_posix(), p.stat().st_size) for p in files)
    record = MergeRecord(_FORMAT_VERSION, exporter_name(), adapters, untied, listed)
    (out / MERGE_JSON).write_bytes(canonical_json(record))
    return record


def _documents(checkpoint: Path) -> Iterator[Path]:
    # A single file of weights has no index, even when one lies about: it would point nowhere.
    left = {MERGE_JSON} | ({INDEX_FILE} if (checkpoint / SINGLE_FILE).exists() else set())
    for path in sorted(checkpoint.iterdir()):
        wanted = path.name.endswith(_SUFFIXES) or path.name.startswith(_NAMES)
        other_index = path.name.endswith(".index.json") and path.name != INDEX_FILE
        hidden = path.name.startswith(".")
        if not wanted or path.name in left or other_index or hidden or path.is_dir():
            continue
        if is_file(path):
            yield path
    yield from (p for p in sorted((checkpoint / _TEMPLATES).glob("*.jinja")) if is_file(p))


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")
