"""A PEFT directory opened for merging: its settings, and its weights one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from remora_build.adapters.peft_directory import (
    CONFIG_FILE,
    PEFT_WEIGHTS,
    PICKLED_WEIGHTS,
    open_weights,
)
from remora_build.adapters.settings import read_config
from remora_build.adapters.weights import PeftWeights
from remora_build.merge.factors import Source
from remora_build.merge.settings import parse_merge_settings
from remora_contract.digests import digest_file
from remora_contract.errors import RequestInvalid, Unsupported


@dataclass(frozen=True)
class Weighted:
    """What the person named: a PEFT directory and how much of it."""

    directory: Path
    weight: float = 1.0


@dataclass(frozen=True)
class OpenAdapter:
    name: str
    digest: str  # of the weights' file
    source: Source
    weights: PeftWeights


@contextmanager
def open_adapter(index: int, adapter: Weighted) -> Iterator[OpenAdapter]:
    """Raises Unsupported, AdapterInvalid, DocumentInvalid or ArtifactInvalid."""
    config_path = adapter.directory / CONFIG_FILE
    settings = parse_merge_settings(read_config(config_path), str(config_path))
    with open_weights(adapter.directory) as weights:
        paths = (adapter.directory / name for name in (PEFT_WEIGHTS, PICKLED_WEIGHTS))
        digest = digest_file(next(path for path in paths if path.exists()))
        source = Source(index, adapter.weight, settings, weights.shapes())
        yield OpenAdapter(_name(adapter.directory), digest, source, weights)


def _name(directory: Path) -> str:
    """The directory's, as any document can hold it."""
    return directory.resolve().name.encode(errors="replace").decode()


def check_composition(adapters: Sequence[OpenAdapter]) -> None:
    """Raises Unsupported for DoRA beside others: its norm is that of one adapter's sum."""
    for adapter in adapters:
        if adapter.source.settings.lora.use_dora and len(adapters) > 1:
            raise Unsupported(
                f"{adapter.source.settings.where}: use_dora: DoRA adapters are not composed, their "
                "norms hold for one adapter alone; merge it by itself"
            )


def check_weights(adapters: Sequence[Weighted]) -> None:
    """Raises RequestInvalid for a weight that is no factor."""
    for adapter in adapters:
        if not abs(adapter.weight) < 1e6:
            raise RequestInvalid(f"--weights {adapter.weight}: a weight is a number below 1e6")
