"""Explains an adapter that Remora wrote in another runtime's format."""

from __future__ import annotations

from pathlib import Path

from remora_build.adapters.formats.manifest import ForeignAdapter, load_manifest
from remora_build.inspect.adapter import targets_table
from remora_build.inspect.files import files_table, verified_text
from remora_build.inspect.render import Report, size_text
from remora_contract.strict import plain

_NAMES = {"edgellm": "TensorRT Edge-LLM", "trtllm": "TensorRT-LLM"}


def describe_foreign(directory: Path, *, verify: bool = False) -> Report:
    """Of a directory with remora.json. Raises ArtifactInvalid, DocumentInvalid."""
    return report_of(directory, load_manifest(directory), verify=verify)


def report_of(directory: Path, manifest: ForeignAdapter, *, verify: bool = False) -> Report:
    """Of the one whose document is at hand. Raises ArtifactInvalid."""
    verified = verified_text(directory, manifest.files, verify)
    rank = max(t.rank for t in manifest.targets)
    facts = (
        ("format", _NAMES[manifest.format]),
        ("base", manifest.base_digest),
        ("dtype", manifest.dtype),
        ("rank", f"{rank} at most"),
        ("tensor parallel ranks", str(manifest.tp_size)),
        ("size", size_text(manifest.bytes)),
        ("written by", manifest.exporter),
        ("files", verified),
    )
    data = {
        "kind": "foreign_adapter",
        "format": manifest.format,
        "bytes": manifest.bytes,
        "rank": rank,
        "verified": verify,
        "document": plain(manifest),
    }
    tables = (targets_table(manifest.targets), files_table(manifest.files))
    return Report(f"Adapter {directory} for {_NAMES[manifest.format]}", data, facts, tables)
