"""`remora-build inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from remora_build.inspect.render import Report

HELP = """Explain a bundle, an adapter or a repository: what it is, shapes, quantization, context,
adapter bank, targets, sizes and digests.
"""


def register(app: typer.Typer) -> None:
    app.command("inspect", help=HELP)(inspect)


def inspect(
    path: Path = typer.Argument(
        help="Bundle, adapter or repository directory.", exists=True, file_okay=False
    ),
    verify: bool = typer.Option(False, "--verify", help="Hash every file or chunk."),
    json: bool = typer.Option(False, "--json", help="Print a JSON object instead of tables."),
) -> None:
    from remora_build.inspect.render import show

    show(describe(path, verify=verify), as_json=json)


def describe(path: Path, *, verify: bool) -> Report:
    """Raises ArtifactInvalid when the directory is none of the three, saying what it may be."""
    from remora_build.adapters.formats.manifest import MANIFEST
    from remora_build.inspect.adapter import describe_adapter
    from remora_build.inspect.bundle import describe_bundle
    from remora_build.inspect.foreign import describe_foreign
    from remora_build.inspect.repository import describe_repository
    from remora_build.publish.store import is_repository
    from remora_contract.adapter import ADAPTER_JSON
    from remora_contract.bundle import BUNDLE_JSON
    from remora_contract.errors import ArtifactInvalid

    if (path / BUNDLE_JSON).exists():
        return describe_bundle(path, verify=verify)
    if (path / ADAPTER_JSON).exists():
        return describe_adapter(path, verify=verify)
    if (path / MANIFEST).exists():
        return describe_foreign(path, verify=verify)
    if is_repository(path):
        return describe_repository(path, verify=verify)
    raise ArtifactInvalid(f"{path} is neither a bundle, an adapter nor a repository{_hint(path)}")


def _hint(path: Path) -> str:
    from remora_contract.use_cases import USE_CASES_JSON

    if (path / USE_CASES_JSON).exists():
        return ": it holds use cases; see remora-build use-cases show"
    if (path / "processed_adapter_model.safetensors").exists():
        return ": it is an Edge-LLM adapter; convert it with remora-build adapter"
    if (path / "model.lora_weights.npy").exists():
        return ": it is a TensorRT-LLM adapter; convert it with remora-build adapter"
    if (path / "adapter_config.json").exists():
        return ": it is a PEFT adapter; convert it with remora-build adapter"
    if (path / "config.json").exists():
        return ": it looks like a checkpoint; export it with remora-build export"
    return ""
