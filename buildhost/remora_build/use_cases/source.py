"""Where a use-case document's adapters lie, and whether they are what QAIRT's files say.

Owns the search for adapter directories and the comparison; converts nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remora_contract.adapter import ADAPTER_JSON, Adapter
from remora_contract.bundle import read_document
from remora_contract.errors import AdapterInvalid, NotFound, UsageWrong
from remora_contract.strict import loads
from remora_contract.use_case_forms import parse_use_cases
from remora_contract.use_cases import USE_CASES_JSON, UseCaseAdapter, UseCaseDocument

PEFT_CONFIG = "adapter_config.json"
_SHOWN = 8


@dataclass(frozen=True)
class Places:
    """Where the command line says adapters are: each by name, or a folder of directories."""

    named: Mapping[str, Path] = field(default_factory=dict)
    folder: Path | None = None


def read_file(path: Path) -> tuple[UseCaseDocument, Path]:
    """The document and the folder that its paths are relative to. `path` is QAIRT's YAML, a
    use_cases.json or the directory of one. Raises ArtifactInvalid, DocumentInvalid, Unsupported."""
    from remora_contract.yaml_text import load_yaml

    file = path / USE_CASES_JSON if path.is_dir() else path
    data = read_document(file)
    if file.suffix == ".json":
        return parse_use_cases(loads(dict[str, Any], data, str(file)), str(file)), file.parent
    return parse_use_cases(load_yaml(data, str(file)), str(file)), file.parent


def locate(document: UseCaseDocument, home: Path, places: Places) -> dict[str, Path]:
    """Adapter name -> its directory, a PEFT adapter or a converted one. Raises NotFound saying
    where was looked, UsageWrong for a name that the document has not."""
    names = {a.name for a in document.adapters}
    for name in places.named:
        if name not in names:
            raise UsageWrong(f"--adapter {name}: the document names no such adapter")
    return {a.name: _directory(a, home, places) for a in document.adapters}


def _directory(adapter: UseCaseAdapter, home: Path, places: Places) -> Path:
    looked = []
    for candidate in _candidates(adapter, home, places):
        if (candidate / PEFT_CONFIG).is_file() or (candidate / ADAPTER_JSON).is_file():
            return candidate
        looked.append(str(candidate))
    there = _directories(places.folder) if places.folder is not None else []
    if not looked:
        raise NotFound(
            f"adapter {adapter.name}: nothing says where it lies; give --adapters FOLDER or "
            f"--adapter {adapter.name}=DIR"
        )
    raise NotFound(
        f"adapter {adapter.name}: no {PEFT_CONFIG} (PEFT) or {ADAPTER_JSON} (converted) in "
        f"{' or '.join(looked)}"
        + (f" (there: {', '.join(there)})" if there else "")
        + "; give --adapters FOLDER or --adapter NAME=DIR"
    )


def _candidates(adapter: UseCaseAdapter, home: Path, places: Places) -> Iterator[Path]:
    """What the command line or the document says of this adapter alone; else the folder, then
    QAIRT's own path where it is that of a PEFT adapter."""
    if adapter.name in places.named:
        yield places.named[adapter.name]
        return
    if adapter.directory is not None:
        yield home / adapter.directory
        return
    if places.folder is not None:
        yield places.folder / adapter.name
    for text in lora_config_paths(adapter):
        path = home / text
        if path.is_dir() or path.name == PEFT_CONFIG:
            yield path if path.is_dir() else path.parent


def _directories(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir())[:_SHOWN]
    except OSError:
        return []  # the folder is named in the error as it is


def lora_config_paths(adapter: UseCaseAdapter) -> tuple[str, ...]:
    """QAIRT's `lora_config` is one path or several. Raises AdapterInvalid for anything else."""
    given = adapter.lora_config
    paths = [] if given is None else given if isinstance(given, list) else [given]
    for path in paths:
        if not isinstance(path, str) or not path:
            raise AdapterInvalid(
                f"adapter {adapter.name}: lora_config must be a path or a list of paths, "
                f"not {str(path)[:80]!r}"
            )
    return tuple(paths)


def qairt_files(adapter: UseCaseAdapter, home: Path) -> dict[str, dict[str, Any] | None]:
    """QAIRT's adapter files (name, rank, alpha, target_modules) by their path as written; None for
    one that is not there. PEFT's own config is not one. Raises ArtifactInvalid, DocumentInvalid."""
    found: dict[str, dict[str, Any] | None] = {}
    for text in lora_config_paths(adapter):
        path = home / text
        if path.is_dir() or path.name == PEFT_CONFIG:
            continue
        found[text] = (
            loads(dict[str, Any], read_document(path), str(path)) if path.exists() else None
        )
    return found


def compare(
    name: str, converted: Adapter, files: Mapping[str, Mapping[str, Any] | None]
) -> list[str]:
    """Notes on what could not be compared. Raises AdapterInvalid where QAIRT's file says another
    name, rank or alpha than the adapter has: it was made from another training run."""
    notes = []
    for path, said in files.items():
        if said is None:
            notes.append(f"{name}: {path} is not there; its rank and alpha are not compared")
            continue
        _compare("name", said, {name}, path)
        _compare("rank", said, {t.rank for t in converted.targets}, path)
        alphas = _alphas(converted.source_config)
        if alphas:
            _compare("alpha", said, alphas, path)
        elif "alpha" in said:
            notes.append(
                f"{name}: alpha of {path} is not compared; the adapter does not say its own"
            )
    return notes


def _compare(key: str, said: Mapping[str, Any], have: set[Any], path: str) -> None:
    if key in said and said[key] not in have:
        raise AdapterInvalid(
            f"{path} says {key} {str(said[key])[:80]!r}, the adapter has "
            f"{', '.join(map(str, sorted(have)))}: give the adapter that this file describes"
        )


def _alphas(config: Mapping[str, Any]) -> set[float]:
    """PEFT's lora_alpha, of the config and of its patterns."""
    pattern = config.get("alpha_pattern")
    values = [config.get("lora_alpha"), *(pattern.values() if isinstance(pattern, dict) else ())]
    return {float(v) for v in values if isinstance(v, (int, float))}
