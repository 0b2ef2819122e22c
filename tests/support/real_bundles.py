"""Real bundles of one tiny checkpoint and adapters for them, made by the product's exporter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from remora_agent.host import AssignedAdapter, Assignment
from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_contract.adapter import load_adapter
from remora_contract.bundle import load_bundle
from tests.support.adapters import random_tensors, write_sidecar
from tests.support.checkpoints import make_checkpoint

OPTIONS = ExportOptions(dtype="float32", max_context=256)


@dataclass(frozen=True)
class RealBundles:
    """`plain` and `int4` share a base; adapters a and b exist as r1 and r2."""

    root: Path

    @property
    def plain(self) -> Path:
        return self.root / "plain"

    @property
    def int4(self) -> Path:
        return self.root / "int4"

    @property
    def cache(self) -> Path:
        return self.root / "engines"

    def adapter_dir(self, name: str, revision: str = "r1") -> Path:
        return self.root / f"{name}-{revision}"

    def assignment(self, release_id: str, bundle: Path, revision: str) -> Assignment:
        adapters = tuple(self._assigned(name, revision) for name in "ab")
        return Assignment(release_id, load_bundle(bundle).digest, bundle, adapters)

    def _assigned(self, name: str, revision: str) -> AssignedAdapter:
        directory = self.adapter_dir(name, revision)
        return AssignedAdapter(name, revision, load_adapter(directory).digest, directory)


def make_real_bundles(root: Path) -> RealBundles:
    checkpoint = make_checkpoint(root / "checkpoint", "qwen3")
    made = RealBundles(root)
    bundle = export_checkpoint(checkpoint, made.plain, OPTIONS)
    export_checkpoint(checkpoint, made.int4, replace(OPTIONS, int4_block=32))
    for seed, (name, revision) in enumerate([(n, r) for n in "ab" for r in ("r1", "r2")]):
        tensors = random_tensors(bundle.decoder, seed=seed)
        write_sidecar(made.adapter_dir(name, revision), bundle.base_digest, tensors)
    return made
