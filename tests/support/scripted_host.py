"""A ServingHost that does what the test says: fails, waits or dies at a named point."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from remora_agent.host import (
    Assignment,
    BuildOutcome,
    Progress,
    ServingAdapterState,
    ServingState,
)
from remora_agent.telemetry.histograms import HistogramReading
from remora_contract.engine import EngineKey, Wanted
from remora_contract.trt_memory import GpuMemory


class ScriptedHost:
    """`hooks[step]` runs before the step (build, prove, switch) takes effect."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.hooks: dict[str, Callable[[Assignment, Progress], None]] = {}
        self.counters: dict[str, float] = {"requests": 0.0, "failures": 0.0, "tokens": 0.0}
        self.drained = threading.Event()
        self.well = True
        self.wanted: Wanted | None = None  # what `engine_wanted` answers
        self.missing: EngineKey | None = None  # what `missing_engine` answers
        self.untakable = ""  # what `take_engine` answers
        self.built: Path | None = None  # what `built_engine` answers
        self.gpu: GpuMemory | None = None  # what `gpu_memory` answers
        self._serving: ServingState | None = None

    def build(self, assignment: Assignment, progress: Progress) -> BuildOutcome:
        self._step("build", assignment, progress)
        progress("building", 1.0)
        return BuildOutcome("sha256:" + "e" * 64, from_cache=False, seconds=0.5)

    def engine_key(self) -> Mapping[str, str]:
        return {"backend": "scripted"}

    def gpu_memory(self) -> GpuMemory | None:
        return self.gpu

    def engine_wanted(self, bundle_directory: Path) -> Wanted | None:
        return self.wanted

    def missing_engine(self, bundle_directory: Path) -> EngineKey | None:
        return self.missing

    def take_engine(self, assignment: Assignment, digest: str, progress: Progress) -> str:
        self.calls.append(("take", digest))
        return self.untakable

    def built_engine(self, bundle_directory: Path) -> Path | None:
        return self.built

    def prove(self, assignment: Assignment, progress: Progress) -> None:
        self._step("prove", assignment, progress)

    def switch(self, assignment: Assignment) -> None:
        self._step("switch", assignment, lambda what, fraction: None)
        for path in (assignment.bundle_directory, *(a.directory for a in assignment.adapters)):
            assert path.is_dir(), f"{path} is not on disk"
        self._serving = ServingState(
            assignment.release_id,
            assignment.bundle_digest,
            "sha256:" + "e" * 64,
            tuple(
                ServingAdapterState(a.name, a.revision, a.digest, 1) for a in assignment.adapters
            ),
        )

    def serving(self) -> ServingState | None:
        return self._serving

    def metrics(self) -> Mapping[str, float]:
        return dict(self.counters)

    def histograms(self) -> tuple[HistogramReading, ...]:
        return ()

    def healthy(self) -> bool:
        return self.well

    def drain(self, timeout_s: float) -> None:
        self.drained.set()

    def lose(self) -> None:
        """What serves goes away by itself."""
        self._serving = None

    def _step(self, name: str, assignment: Assignment, progress: Progress) -> None:
        self.calls.append((name, assignment.release_id))
        if name in self.hooks:
            self.hooks[name](assignment, progress)
