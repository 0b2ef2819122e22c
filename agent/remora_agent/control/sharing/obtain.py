"""Before a build: whether another device of this class has built the engine, or is about to.

Runs on the worker's thread. Whatever goes wrong here ends in a build of the device's own: sharing
saves time and must never cost a release.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from remora_agent.control.activation import Record
from remora_agent.control.fetch import TRANSIENT, Pace
from remora_agent.control.holds import Hold
from remora_agent.control.sharing.calls import SharingCalls, ToBuild, ToFetch, ToWait
from remora_agent.control.sharing.pending import Pending, PendingStore
from remora_agent.control.staging import Stager, Wanted
from remora_agent.host import Assignment, Progress, ServingHost
from remora_contract.bundle import is_graph_file
from remora_contract.device_phase import Phase
from remora_contract.digests import canonical_json
from remora_contract.engine import EngineKey
from remora_contract.errors import (
    DeadlineExceeded,
    Exhausted,
    InvalidInput,
    NotFound,
    RemoraError,
)

log = logging.getLogger(__name__)
PATIENCE_S = 30.0  # with a controller that cannot be reached
MAX_WAIT_S = 4 * 3600.0  # whatever the controller says
_MAX_FETCHES = 3
_MOST_FAILURES = 8  # a minute or two, with the backoff of downloads
# A built engine is at most as large as what its build may write: see `engine.build`.
_MOST_OF_GRAPH, _MOST_BESIDE = 12, 64 << 20


@dataclass(frozen=True)
class Origin:
    """Where the engine comes from. `leased`: it is built for others too."""

    what: Literal["own", "shared"]
    why: str = ""
    leased: bool = False


class Origins(Protocol):
    def obtain(self, record: Record, assignment: Assignment, progress: Progress) -> Origin:
        """Blocks while another device builds. Raises Cancelled only."""
        ...


class ImpatientPace(Pace):
    """Of downloads that the device can do without."""

    def wait_after(self, failures: int) -> None:
        """Raises DeadlineExceeded after many failures in a row."""
        if failures >= _MOST_FAILURES:
            raise DeadlineExceeded(f"nothing came in {failures} attempts")
        super().wait_after(failures)


class NoSharing:
    """Of a device that asks nobody."""

    def obtain(self, record: Record, assignment: Assignment, progress: Progress) -> Origin:
        return Origin("own")


@dataclass
class _Try:
    """One build's asking."""

    key: EngineKey
    record: Record
    assignment: Assignment
    progress: Progress
    began_s: float
    fetches: int = 0
    failures: int = 0
    failing_since_s: float | None = None


@dataclass
class EngineSharing:
    """`calls` gives the connection in use; `emit` tells an event."""

    calls: Callable[[], SharingCalls]
    host: ServingHost
    stager: Stager
    pace: Pace
    pending: PendingStore
    emit: Callable[[str, dict[str, object]], None]
    _waiting: str = field(default="", init=False)

    def holding(self, record: Record | None) -> Hold | None:
        """Why the build has not begun; for the device's report."""
        if record is None or record.phase is not Phase.BUILDING or not self._waiting:
            return None
        return Hold(self._waiting, None)

    def obtain(self, record: Record, assignment: Assignment, progress: Progress) -> Origin:
        if assignment.engines:
            return Origin("own")  # the release brought one that fits
        key = self.host.missing_engine(assignment.bundle_directory)
        if key is None:
            return Origin("own")
        asking = _Try(key, record, assignment, progress, self.pace.now())
        try:
            return self._obtain(asking)
        finally:
            self._waiting = ""

    def _obtain(self, asking: _Try) -> Origin:
        while True:
            self.pace.interrupt.check()
            try:
                origin = self._ask(asking)
            except RemoraError as e:
                self.pace.interrupt.check()
                origin = self._failed(asking, e)
            if origin is not None:
                if origin.what == "own":
                    log.info("engine.own", extra={"why": origin.why, "leased": origin.leased})
                return origin

    def _ask(self, asking: _Try) -> Origin | None:
        """None: ask again."""
        answer = self.calls().claim(canonical_json(asking.key))
        asking.failures, asking.failing_since_s = 0, None
        if isinstance(answer, ToBuild):
            record, key_json = asking.record, canonical_json(asking.key).decode()
            bundle = asking.assignment.bundle_digest
            self.pending.begin(Pending(record.desired.generation, bundle, key_json, answer.lease_s))
            return Origin("own", answer.why, leased=True)
        if isinstance(answer, ToFetch):
            return self._fetch(asking, answer)
        if isinstance(answer, ToWait):
            return self._wait(asking, answer)
        return Origin("own", answer.why)

    def _wait(self, asking: _Try, answer: ToWait) -> Origin | None:
        waited_s = self.pace.now() - asking.began_s
        if waited_s >= MAX_WAIT_S:
            return Origin("own", f"waited {waited_s:.0f} s: {answer.why}")
        if answer.why != self._waiting:
            log.info("engine.waiting", extra={"why": answer.why})
        self._waiting = answer.why
        asking.progress("waiting for a shared engine", 0.0)
        self.pace.interrupt.sleep(answer.ask_again_s)
        return None

    def _fetch(self, asking: _Try, answer: ToFetch) -> Origin | None:
        self._waiting = ""
        asking.fetches += 1
        if asking.fetches > _MAX_FETCHES:
            return Origin("own", f"{_MAX_FETCHES} shared engines were not usable")
        try:
            taken = self._taken(asking, answer)
        except NotFound as e:  # it was removed meanwhile
            log.info("engine.gone", extra={"engine": answer.digest, "cause": str(e)})
            return None
        except Exhausted as e:
            return Origin("own", f"the engine of {answer.built_by} could not be fetched: {e}")
        except InvalidInput as e:
            taken = str(e)
        if not taken:
            return Origin("shared", f"built by {answer.built_by}")
        log.warning("engine.rejected", extra={"engine": answer.digest, "reason": taken})
        self.calls().reject(asking.key.digest, answer.digest, taken)
        return None

    def _taken(self, asking: _Try, answer: ToFetch) -> str:
        """ "" once the engine is in the cache, else what is wrong with it. Raises what fetching
        does, Exhausted also where proving it had no memory."""
        started_s = self.pace.now()
        graph = (f.size for f in asking.key.files if is_graph_file(f.path))
        most = _MOST_OF_GRAPH * sum(graph) + _MOST_BESIDE
        manifest = self.stager.manifest(answer.digest)
        if manifest.bytes != answer.bytes or manifest.bytes > most:
            return f"it has {manifest.bytes} bytes, promised were {answer.bytes}, allowed {most}"
        fetched = self.stager.stage([Wanted("engine", answer.digest)], asking.progress)
        detail: dict[str, object] = {
            "engine": answer.digest,
            "built_by": answer.built_by,
            "bytes": sum(f.received_bytes for f in fetched),
        }
        why = self.host.take_engine(asking.assignment, answer.digest, asking.progress)
        seconds = round(self.pace.now() - started_s, 3)
        if not why:
            self.emit("engine.fetched", {**detail, "seconds": seconds})
        return why

    def _failed(self, asking: _Try, error: RemoraError) -> Origin | None:
        """A build of its own, or None while the controller may come back."""
        if not isinstance(error, TRANSIENT):
            return Origin("own", f"engines are not shared here: {error}")
        now = self.pace.now()
        if asking.failing_since_s is None:
            asking.failing_since_s = now
        if now - asking.failing_since_s >= PATIENCE_S:
            return Origin("own", f"the controller does not answer: {error}")
        log.info("engine.ask_retry", extra={"cause": str(error)})
        self.pace.wait_after(asking.failures)
        asking.failures += 1
        return None
