"""Writes a use-case document as QAIRT reads it: lora_config.yaml, and an adapter file for each
adapter that does not come from QAIRT.

What QAIRT asks for and the document does not hold is named, not invented.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from remora_build.staging import write_failed
from remora_build.use_cases.source import read_file
from remora_contract.adapter import load_adapter
from remora_contract.errors import Conflict, Refused, UsageWrong
from remora_contract.release import BASE_USE_CASES
from remora_contract.use_case_forms import qairt_form
from remora_contract.use_cases import UseCaseAdapter, UseCaseDocument


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def write_qairt(source: Path, file: Path, *, replace_file: bool = False) -> tuple[str, ...]:
    """Writes FILE, adapter files first; returns what QAIRT's tools will still ask for.

    Raises UsageWrong, Conflict (a file exists), Refused (an adapter that QAIRT's adapter file
    cannot describe), ArtifactInvalid, DocumentInvalid, Exhausted.
    """
    if file.suffix not in (".yaml", ".yml"):
        raise UsageWrong(f"{file}: name a .yaml file")
    document, home = read_file(source)
    described = {a.name: _adapter_file(a, home) for a in document.adapters if a.lora_config is None}
    adapters = tuple(
        replace(a, lora_config=f"{a.name}.json") if a.name in described else a
        for a in document.adapters
    )
    written = replace(document, adapters=adapters)
    texts = {
        f"{name}.json": json.dumps(said, indent=2, sort_keys=True) + "\n"
        for name, said in described.items()
    }
    texts[file.name] = yaml.dump(qairt_form(written), Dumper=_Dumper, sort_keys=False)
    _write_all(file.parent, texts, replace_file)
    return missing(document)


def missing(document: UseCaseDocument) -> tuple[str, ...]:
    """What qairt-lora-model-creator needs besides."""
    wanted = []
    if document.attach_point_onnx_mapping is None:
        wanted.append("attach_point_onnx_mapping: module names to nodes of the base graph")
    if not any(u.name in BASE_USE_CASES for u in document.use_cases):
        wanted.append("a use case named base, without adapters")
    without = [u.name for u in document.use_cases if u.model_name is None]
    if without:
        wanted.append(f"model_name (an ONNX graph) of {', '.join(without)}")
    return tuple(wanted)


def _adapter_file(entry: UseCaseAdapter, home: Path) -> dict[str, Any]:
    """QAIRT's description of an adapter: one rank, PEFT's lora_alpha, modules by their names."""
    if entry.directory is None:
        raise Refused(
            f"adapter {entry.name} has neither lora_config nor a converted adapter to describe; "
            "run remora-build use-cases convert first"
        )
    adapter = load_adapter(home / entry.directory)
    config = adapter.source_config
    alpha, modules = config.get("lora_alpha"), config.get("target_modules")
    ranks = {t.rank for t in adapter.targets}
    for is_so, what in (
        (len(ranks) > 1, f"ranks {', '.join(map(str, sorted(ranks)))}"),
        (bool(config.get("alpha_pattern")), "an alpha_pattern"),
        (bool(config.get("use_rslora")), "use_rslora"),
        (not isinstance(modules, list), "target_modules that are no list"),
        (not isinstance(alpha, int), f"a lora_alpha of {alpha}"),
    ):
        if is_so:
            raise Refused(
                f"adapter {entry.name} has {what}, which QAIRT's adapter file (one rank, one whole "
                "alpha, a list of modules) cannot say; give its lora_config in the document"
            )
    return {
        "name": entry.name,
        "rank": adapter.rank,
        "alpha": alpha,
        "target_modules": sorted(map(str, modules or [])),
    }


def _write_all(folder: Path, texts: dict[str, str], replace_file: bool) -> None:
    """All or none: written beside their places first, then renamed in order."""
    for name in texts:
        if (folder / name).exists() and not replace_file:
            raise Conflict(f"{folder / name} exists already; give --force to replace it")
    with _temporary(folder, texts) as made:
        for path, place in made:
            path.replace(place)


@contextmanager
def _temporary(folder: Path, texts: dict[str, str]) -> Iterator[list[tuple[Path, Path]]]:
    """(written file, its place) each; what is not renamed is removed."""
    made: list[tuple[Path, Path]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            descriptor, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
            made.append((Path(temporary), folder / name))
            with os.fdopen(descriptor, "w", encoding="utf-8") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
            Path(temporary).chmod(0o644)
        yield made
    except OSError as e:
        raise write_failed(folder, e) from e
    finally:
        for path, _ in made:
            path.unlink(missing_ok=True)
