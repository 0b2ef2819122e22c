"""The ServingHost of this process: releases become models, and switches lose no request.

Owns which model serves which assignment. When to build, prove and switch is decided elsewhere.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from remora_agent.host import (
    Assignment,
    BuildOutcome,
    Progress,
    ServingAdapterState,
    ServingState,
)
from remora_agent.hosting.engines import EngineSource, available_memory, verify_small_files
from remora_agent.hosting.faults import EndCount, FaultCount
from remora_agent.hosting.models import EngineModels, ModelOpener
from remora_agent.hosting.names import adopt
from remora_agent.hosting.retiring import Retiring, added, counted
from remora_agent.runtime.model import Model
from remora_agent.runtime.options import RuntimeOptions
from remora_agent.runtime.status import RuntimeState
from remora_agent.serving.experiment_counts import ExperimentCounts
from remora_agent.serving.held_calls import HeldCalls
from remora_agent.serving.router import Router
from remora_agent.serving.served_model import ServedModel
from remora_agent.serving.use_case_counts import UseCaseCounts
from remora_agent.telemetry.histograms import HistogramReading
from remora_agent.telemetry.observers import Observers, Observing
from remora_agent.text.tools import ToolFormat
from remora_contract.adapter import load_adapter
from remora_contract.bundle import load_bundle
from remora_contract.digests import hex_of, short
from remora_contract.engine import EngineKey, Wanted
from remora_contract.errors import ArtifactInvalid, Refused, RemoraError, Unavailable
from remora_contract.trt_memory import GpuMemory

log = logging.getLogger(__name__)
_POLL_S = 0.02
_STEP_STUCK_S = 60.0


@dataclass(frozen=True)
class HostSettings:
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    retire_s: float = 600.0  # what an old model's requests get to end while the new one serves
    idle_s: float = 300.0  # how long calls are held for running ones when two models do not fit
    tool_format: ToolFormat | None = None  # None: what each bundle's chat template says


@dataclass(frozen=True)
class _Serving:
    model: ServedModel
    assignment: Assignment


class LocalHost:
    """Implements `remora_agent.host.ServingHost` behind `router`. Thread-safe; one switch at a
    time."""

    def __init__(
        self,
        engines: EngineSource,
        router: Router[ServedModel],
        settings: HostSettings | None = None,
        available_bytes: Callable[[], int] = available_memory,
        observers: Observers | None = None,
        models: ModelOpener | None = None,
    ) -> None:
        """`observers` hear of every request, over switches of models; they are the caller's.
        `models` None are engines of `engines`, step by step."""
        self._engines = engines
        self._models = models or EngineModels(engines)
        self._router = router
        self._settings = settings or HostSettings()
        self._available_bytes = available_bytes
        self._switching = threading.Lock()
        self._ending = threading.Event()
        # Guards the pair below: a runtime is counted in exactly one of them.
        self._books = threading.Lock()
        self._serving: _Serving | None = None
        self._retiring = Retiring()
        self._faults = FaultCount()
        self._ended_held = EndCount()
        self._use_cases = UseCaseCounts()
        self._experiments = ExperimentCounts()
        self._observers = observers or Observers(Observing())

    def build(self, assignment: Assignment, progress: Progress) -> BuildOutcome:
        self._check(assignment)
        adapters = [a.directory for a in assignment.adapters]
        directory = assignment.bundle_directory
        return self._engines.build(directory, progress, assignment.engines, adapters)

    def engine_key(self) -> Mapping[str, str]:
        return self._engines.key()

    def gpu_memory(self) -> GpuMemory | None:
        return self._engines.gpu_memory()

    def engine_wanted(self, bundle_directory: Path) -> Wanted | None:
        return self._engines.wanted(bundle_directory)

    def missing_engine(self, bundle_directory: Path) -> EngineKey | None:
        return self._engines.missing(bundle_directory)

    def take_engine(self, assignment: Assignment, digest: str, progress: Progress) -> str:
        check(assignment)
        adapters = [a.directory for a in assignment.adapters]
        directory = assignment.bundle_directory
        staged = directory.with_name(hex_of(digest))
        return self._engines.take(directory, staged, adapters, progress)

    def built_engine(self, bundle_directory: Path) -> Path | None:
        return self._engines.built(bundle_directory)

    def prove(self, assignment: Assignment, progress: Progress) -> None:
        self._check(assignment)
        directories = [a.directory for a in assignment.adapters]
        self._engines.probe(assignment.bundle_directory, directories, progress)
        if assignment.golden:
            now = self._serving
            self._engines.ask(assignment, None if now is None else now.assignment, progress)

    def switch(self, assignment: Assignment) -> None:
        """Raises Refused when two models do not fit and requests do not end in time, and what
        opening an engine and registering adapters raise. The old assignment then still serves."""
        self._check(assignment)
        with self._switching:
            if self._ending.is_set():
                raise Refused("this agent is shutting down; start it again")
            started, now = time.monotonic(), self._serving
            if now is not None and _alive(now) and _same_bundle(now.assignment, assignment):
                adopt(now.model, now.assignment, assignment)
                now.model.runtime.forget_recent()  # its times are judged by themselves
                self._serving = _Serving(now.model, assignment)
            elif now is None or self._fits_beside(assignment):
                self._open_beside(assignment)
            else:
                self._open_instead(now, assignment)
            log.info(
                "release.switched",
                extra={
                    "release": assignment.release_id,
                    "seconds": round(time.monotonic() - started, 4),
                },
            )

    def serving(self) -> ServingState | None:
        now = self._serving
        if now is None or not _alive(now):
            return None
        status = now.model.runtime.status()
        aliases = now.model.runtime.adapters.directory.aliases()
        return ServingState(
            release_id=now.assignment.release_id,
            bundle_digest=status.bundle_digest,
            engine_digest=status.engine_digest,
            adapters=tuple(
                ServingAdapterState(a.name, a.revision, a.digest, a.epoch) for a in aliases
            ),
        )

    def metrics(self) -> Mapping[str, float]:
        """Counters go on over switches; everything else is the current model's."""
        with self._books:
            now, past = self._serving, self._retiring.counters()
            metrics = dict(now.model.runtime.metrics()) if now is not None else {}
        directory = None if now is None else now.model.runtime.adapters.directory
        told = self._experiments.metrics(() if directory is None else directory.experiments())
        counters = added(added(counted(metrics), past), self._ended_held.counters())
        faults = {"engine_faults": float(self._faults.count)}
        return {**metrics, **counters, **faults, **self._use_cases.metrics(), **told}

    def histograms(self) -> list[HistogramReading]:
        return self._observers.histograms.readings()

    def healthy(self) -> bool:
        """False when a step thread has died or stands still. True while nothing is loaded."""
        now = self._serving
        if now is None:
            return True
        return _alive(now) and now.model.runtime.status().heartbeat_age_s < _STEP_STUCK_S

    def drain(self, timeout_s: float) -> None:
        self._ending.set()
        self._router.close()
        until = time.monotonic() + timeout_s
        with self._switching:
            self._succeed(None, timeout_s)
        if not self._retiring.wait(max(0.0, until - time.monotonic()) + 1.0):
            log.warning("host.drain_incomplete", extra={"waited_s": timeout_s})

    def _check(self, assignment: Assignment) -> None:
        """Raises as `check`, and Unsupported."""
        check(assignment)
        self._models.check(assignment)

    def _fits_beside(self, assignment: Assignment) -> bool:
        """With the prefixes that it will keep."""
        available = self._available_bytes() - self._settings.runtime.prefix_bytes
        refusals = self._engines.memory_refusals(assignment.bundle_directory, available)
        for refusal in refusals:
            log.info("release.does_not_fit_beside", extra={"why": str(refusal)})
        return not refusals

    def _open_beside(self, assignment: Assignment) -> None:
        """What the old model has not begun with goes to the new one, before any new call; the rest
        ends there."""
        model = self._open(assignment)
        self._router.hold()
        try:
            old = self._serving
            held = self._give_up_waiting(old.model) if old is not None else HeldCalls()
            self._succeed(_Serving(model, assignment), self._settings.retire_s)
            held.hand_over(model, model.runtime.now())
        finally:
            self._router.replace(model)

    def _succeed(self, new: _Serving | None, retire_s: float) -> None:
        """Whatever served before retires."""
        with self._books:
            old, self._serving = self._serving, new
            if old is not None:
                self._retiring.retire(old.model.runtime, retire_s)

    def _open_instead(self, now: _Serving, assignment: Assignment) -> None:
        """Calls wait, in the router or as held ones, from here until a model stands."""
        self._router.hold()
        held = self._give_up_waiting(now.model)
        if not self._wait_idle(now.model.runtime):
            held.hand_back(now.model, now.model.runtime.now())
            self._router.replace(now.model)
            raise Refused(
                f"{assignment.release_id} does not fit in memory beside the running release, "
                f"whose requests did not end within {self._settings.idle_s:.0f} s; try again"
            )
        with self._books:
            self._serving = None
            self._retiring.admit(now.model.runtime)
        self._retiring.close_now(now.model.runtime)
        try:
            self._stand(self._open(assignment), assignment, held)
        except BaseException:
            self._reopen(now.assignment, held)
            raise

    def _stand(self, model: ServedModel, assignment: Assignment, held: HeldCalls) -> None:
        """From now on `model` answers, what waited longest first."""
        self._serving = _Serving(model, assignment)
        held.hand_over(model, model.runtime.now())
        self._router.replace(model)

    def _reopen(self, assignment: Assignment, held: HeldCalls) -> None:
        try:
            model = self._open(assignment)
        except BaseException as e:
            log.error("release.not_reopened", extra={"why": str(e)})
            gone = f"no model is loaded: {assignment.release_id} would not open: {e}"
            held.fail(Unavailable(gone))
            self._router.clear(gone)
            if isinstance(e, RemoraError):
                return  # the error that kept the new release from opening is the one to tell
            raise
        self._stand(model, assignment, held)

    def _give_up_waiting(self, model: ServedModel) -> HeldCalls:
        held = model.give_up_waiting(self._ended_held.observe)
        log.info("release.queue_moves", extra={"calls": len(held)})
        return held

    def _open(self, assignment: Assignment) -> ServedModel:
        """A model that answers for the assignment, probed and not yet routed to."""
        runtime = self._models.open(assignment, self._settings.runtime, self._available_bytes)
        model = ServedModel(
            runtime,
            self._faults.observe,
            self._use_cases,
            self._observers.records,
            self._settings.tool_format,
            self._experiments,
        )
        try:
            runtime.probe()
            adopt(model, None, assignment)
        except BaseException:
            runtime.close()
            raise
        return model

    def _wait_idle(self, runtime: Model) -> bool:
        """Nobody can submit meanwhile: the router holds."""
        until = time.monotonic() + self._settings.idle_s
        while True:
            status = runtime.status()
            if not status.rows_busy and not status.queued and self._retiring.wait(0.0):
                return True
            if time.monotonic() >= until or self._ending.wait(_POLL_S):
                return False


def check(assignment: Assignment) -> None:
    """The directories hold what the assignment says. Raises ArtifactInvalid, DocumentInvalid."""
    bundle = load_bundle(assignment.bundle_directory)
    _check_digest(f"{assignment.bundle_directory}", assignment.bundle_digest, bundle.digest)
    verify_small_files(assignment.bundle_directory, bundle)
    for adapter in assignment.adapters:
        found = load_adapter(adapter.directory).digest
        _check_digest(f"adapter {adapter.name} in {adapter.directory}", adapter.digest, found)


def _check_digest(what: str, wanted: str, found: str) -> None:
    if wanted != found:
        raise ArtifactInvalid(f"{what} has digest {short(found)}, not {short(wanted)}; fetch again")


def _same_bundle(now: Assignment, wanted: Assignment) -> bool:
    return now.bundle_digest == wanted.bundle_digest


def _alive(serving: _Serving) -> bool:
    return serving.model.runtime.status().state is RuntimeState.SERVING
