"""Between the control plane and serving: what the reconciler may ask of the process that serves.

The reconciler decides *when* (activation state machine, persisted); a ServingHost does *what*.
Everything that could take the device down happens in a child process behind `prove`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from remora_agent.telemetry.histograms import HistogramReading
from remora_contract.engine import EngineKey, Wanted
from remora_contract.experiments import Experiment
from remora_contract.gates import GoldenQuestion
from remora_contract.release import ReleaseUseCase, SamplingDefaults
from remora_contract.trt_memory import GpuMemory

# (what is happening, fraction done 0..1)
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class AssignedAdapter:
    name: str
    revision: str
    digest: str
    directory: Path


@dataclass(frozen=True)
class Assignment:
    """A release made concrete: verified directories on this device."""

    release_id: str
    bundle_digest: str
    bundle_directory: Path
    adapters: tuple[AssignedAdapter, ...] = ()
    use_cases: tuple[ReleaseUseCase, ...] = ()
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    golden: tuple[GoldenQuestion, ...] = ()  # asked in a child process before it serves
    experiments: tuple[Experiment, ...] = ()
    engines: tuple[Path, ...] = ()  # built elsewhere and staged; used where the build key is ours


@dataclass(frozen=True)
class ServingAdapterState:
    name: str
    revision: str
    digest: str
    epoch: int


@dataclass(frozen=True)
class ServingState:
    release_id: str
    bundle_digest: str
    engine_digest: str
    adapters: tuple[ServingAdapterState, ...]


@dataclass(frozen=True)
class BuildOutcome:
    engine_digest: str
    from_cache: bool
    seconds: float
    shipped: bool = False  # taken from the release
    why: str = ""  # built although the release carried an engine, or not of the better graph
    dialect: str | None = None  # of the graph that was built, where the bundle has two

    @property
    def source(self) -> Literal["cached", "shipped", "built"]:
        if self.from_cache:
            return "cached"
        return "shipped" if self.shipped else "built"


class ServingHost(Protocol):
    def build(self, assignment: Assignment, progress: Progress) -> BuildOutcome:
        """Finds the engine in the cache, takes one of the assignment's that fits and answers the
        golden prompts in a child process, or builds it in one. Blocking.

        Raises EngineFault with the child's last words, Exhausted for memory, disk and time."""
        ...

    def engine_key(self) -> Mapping[str, str]:
        """What of the build key holds for every bundle (`remora_contract.engine.flat`)."""
        ...

    def gpu_memory(self) -> GpuMemory | None:
        """Of the GPU that engines take; None: they take the system's, or it is not known."""
        ...

    def engine_wanted(self, bundle_directory: Path) -> Wanted | None:
        """The whole build key of this bundle's engine; None when it is in the cache. Raises what a
        build would raise before it begins."""
        ...

    def missing_engine(self, bundle_directory: Path) -> EngineKey | None:
        """Like `engine_wanted`, as the key whose digest names the build."""
        ...

    def take_engine(self, assignment: Assignment, digest: str, progress: Progress) -> str:
        """Proves an engine that was staged among the artifacts, in a child process, and takes it
        into the cache. "" when it is there, else what is wrong with it. Raises Exhausted where this
        device could not find out."""
        ...

    def built_engine(self, bundle_directory: Path) -> Path | None:
        """The folder of this bundle's engine; None when it is not in the cache."""
        ...

    def prove(self, assignment: Assignment, progress: Progress) -> None:
        """Loads engine and adapters in a child process and answers the bundle's golden prompts and
        the release's golden questions there, while the old release serves. Raises EngineFault
        naming what was answered wrongly, Unsupported for what cannot be asked here."""
        ...

    def switch(self, assignment: Assignment) -> None:
        """Serves the assignment from now on. With the same bundle only aliases and use cases
        change: no request fails or waits. With another bundle the old engine is closed only
        after the new one stands. On an error the old assignment still serves. Blocking."""
        ...

    def serving(self) -> ServingState | None: ...

    def metrics(self) -> Mapping[str, float]:
        """Serving metrics since start: ttft_s, inter_token_s, tokens_per_s, queue_depth, …"""
        ...

    def histograms(self) -> Sequence[HistogramReading]:
        """Distributions of what requests waited for, since start."""
        ...

    def healthy(self) -> bool:
        """False when what serves has died or stands still and only a restart or a switch helps.
        True while nothing serves."""
        ...

    def drain(self, timeout_s: float) -> None:
        """Stops admitting, lets running requests end, then closes. For shutdown."""
        ...
