"""Drives one device from what it runs to what is assigned: decide, persist the intent, perform.

One worker thread calls `run`; other threads call `assign`, `report` and `stop`. The record in
state.db changes only here, always before the effect it announces.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from remora_agent.control.activation import (
    Advance,
    Desired,
    Effect,
    Idle,
    Perform,
    Record,
    WaitUntil,
    advance,
    after_start,
    assign,
    counted,
    decide,
)
from remora_agent.control.effects import Effects
from remora_agent.control.garbage import collect
from remora_agent.control.holds import Hold
from remora_agent.control.interrupt import Interrupt
from remora_agent.control.pacing import Backoff
from remora_agent.control.phase import Event
from remora_agent.control.releases import link_current
from remora_agent.control.soak import unhealthy_reason
from remora_agent.control.state import DeviceState, PastRuns
from remora_agent.telemetry.serving import serving_metrics
from remora_contract.device_phase import FINAL, Phase
from remora_contract.errors import (
    Cancelled,
    Conflict,
    Exhausted,
    Incompatible,
    InternalFault,
    RemoraError,
)

log = logging.getLogger(__name__)
_POLL_S = 1.0
_HEALTHY_RUN_S = 600.0
_FULL_DISK_WAIT_S = 5.0


@dataclass(frozen=True)
class Report:
    """The record and what serves, at one moment."""

    record: Record | None
    progress: float
    hold: Hold | None = None  # why the record's switch waits


@dataclass
class _Restoring:
    """Attempts to serve the committed release when nothing serves."""

    failures: int = 0
    not_before_s: float = 0.0
    backoff: Backoff = field(default_factory=lambda: Backoff(base_s=2.0, cap_s=300.0))


class Reconciler:
    def __init__(
        self,
        state: DeviceState,
        effects: Effects,
        interrupt: Interrupt,
        now: Callable[[], float],
        random_unit: Callable[[], float],
        pinned: tuple[str, ...] = (),
        on_change: Callable[[], None] = lambda: None,
        holding: Callable[[Record | None], Hold | None] = lambda record: None,
        last_words: str = "",
    ) -> None:
        """`now` is monotonic; `on_change` hears of every new phase and must return at once;
        `holding` says why a switch waits (`holds`); `last_words` are the log's last lines of the
        run before this one."""
        self._state, self._effects, self._interrupt = state, effects, interrupt
        self._now, self._random_unit = now, random_unit
        self._pinned, self.on_change, self._holding = pinned, on_change, holding
        self._last_words = last_words
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._stopping = False
        self._record = state.record()
        self._progress = 0.0
        self._baseline: Mapping[str, float] = {}
        self._restoring = _Restoring()
        self._started_s = now()
        self._forgiven = False
        self._untidy = False

    def start(self, kernel_boot_id: str) -> None:
        """Meets what the last run left: resumes, or sets out to revert. Call once, before `run`.

        A full disk keeps nothing from serving: what cannot be written down is only remembered, and
        a restart would conclude the same from what is on disk."""
        past, record = self._begin_run(kernel_boot_id), self._record
        if record is not None and past.was_cut:
            record = counted(record)
        event = after_start(record, past.abnormal_exits)
        if record is not None and event is not None:
            self._meet(record, event, past.abnormal_exits)
        self._tidy(self._record)

    def _begin_run(self, kernel_boot_id: str) -> PastRuns:
        try:
            return self._state.begin_run(kernel_boot_id)
        except Exhausted as e:
            log.error("state_dir.full", extra={"cause": str(e)})
            return PastRuns()

    def _meet(self, record: Record, event: Event, exits: int) -> None:
        code, message = _start_error(record, event, exits, self._last_words)
        try:
            self._move(record, event, code, message)
            if event is Event.CRASH_LOOP:
                self._state.forgive_exits()  # of a way back too, whose phase stays as it was
        except Exhausted as e:
            log.error("record.not_saved", extra={"cause": str(e)})
            self._record = advance(record, event, self._now(), code, message)

    def assign(self, desired: Desired) -> bool:
        """Takes a newer assignment at once, or answers False when it must wait for a switch or
        revert that is under way (offer it again at the next Sync)."""
        with self._lock:
            try:
                record = assign(self._record, desired, self._now())
            except Conflict as e:
                log.info("assignment.deferred", extra={"cause": str(e)})
                return False
            self._save(record)
            # Not here: the worker may still be writing what is dropped.
            self._untidy = record.phase in FINAL
            self._interrupt.set("a newer assignment arrived")
        self._announce(record)
        self._wake.set()
        return True

    def report(self) -> Report:
        with self._lock:
            return Report(self._record, self._progress, self._holding(self._record))

    def run(self, restored: threading.Event) -> None:
        """Until `stop`. Sets `restored` once the committed release serves or could not."""
        self._ensure_serving()
        restored.set()
        while not self._stopping:
            wait_s = self._guarded_step()
            if wait_s > 0:
                self._wake.wait(wait_s)
                self._wake.clear()

    def stop(self) -> None:
        """Ends long work where it can be resumed; `run` returns after the effect in progress."""
        self._stopping = True
        self._interrupt.set("the agent stops")
        self._wake.set()

    def _guarded_step(self) -> float:
        try:
            return self.step()
        except Exhausted as e:
            # The record could not be written, so nothing moved: try again when there is room.
            log.error("record.not_saved", extra={"cause": str(e)})
            return _FULL_DISK_WAIT_S

    def step(self) -> float:
        """At most one transition or effect. Returns seconds that may pass before the next."""
        with self._lock:
            record = self._record
            if not self._stopping:
                self._interrupt.clear()
            is_held = self._holding(record) is not None
            action = decide(record, self._now(), self._unhealthy(record), is_held)
            if record is None or isinstance(action, Idle):
                self._settle(record)
            elif isinstance(action, Advance):
                self._bookkeep(record, action.event)
        # Without the lock: effects take minutes, and the Sync loop reports and assigns meanwhile.
        if record is None or isinstance(action, Idle):
            self._serve_again()
            return _POLL_S
        if isinstance(action, WaitUntil):
            return min(_POLL_S, max(0.0, action.at_s - self._now()))
        if isinstance(action, Perform):
            self._perform(record, action)
        return 0.0

    def _bookkeep(self, record: Record, event: Event) -> None:
        if event is Event.UNHEALTHY:
            reason = self._unhealthy(record) or "unhealthy"
            self._move(record, event, "Unhealthy", f"while soaking: {reason}")
        else:
            self._move(record, event)

    def _perform(self, record: Record, action: Perform) -> None:
        try:
            event, error = self._effects.perform(action.effect, record, self._on_progress), None
        except RemoraError as e:
            if isinstance(e, Cancelled) and self._interrupted(record):
                log.info("effect.interrupted", extra={"effect": action.effect.value})
                return
            event, error = _failure_event(action.effect), e
        # The one barrier: a fault of a new release, of whatever kind, must not end the process
        # that serves the old one.
        except Exception as e:
            log.exception("effect.crashed", extra={"effect": action.effect.value})
            event = _failure_event(action.effect)
            error = InternalFault(f"{action.effect.value} crashed: {type(e).__name__}: {e}")
        with self._lock:
            if self._record is not record:
                log.info("effect.superseded", extra={"effect": action.effect.value})
                return
            code, message = ("", "") if error is None else (_code(error), str(error))
            self._move(record, event, code, message)

    def _move(self, record: Record, event: Event, code: str = "", message: str = "") -> None:
        """Persists, then tells."""
        moved = advance(record, event, self._now(), code, message)
        self._save(moved)
        if moved.phase is Phase.SOAKING:
            self._baseline = serving_metrics(self._effects.host.metrics())
        if moved.phase in FINAL:
            self._tidy(moved)
        self._announce(moved)

    def _tidy(self, record: Record | None) -> None:
        """Views and left-overs of the record: the next start or final phase repairs them."""
        try:
            link_current(self._effects.layout, record)
            if record is not None and record.phase in FINAL:
                collect(self._effects.layout, record, self._pinned)
        except OSError as e:
            log.error("state_dir.untidy", extra={"cause": str(e)})

    def _save(self, record: Record) -> None:
        with self._lock:
            # What ran until now is not what the next abnormal exit will speak of.
            is_new = self._record is None or record.phase is not self._record.phase
            forgives = is_new and (record.phase in FINAL or record.phase is Phase.REVERTING)
            self._state.save_record(record, forgives)
            self._record, self._progress = record, 0.0

    def _announce(self, record: Record) -> None:
        detail = {
            "generation": record.desired.generation,
            "release": record.desired.release_id,
            "error_code": record.error_code,
            "error": record.error_message,
        }
        self._effects.emit(f"release.{record.phase.value.lower()}", detail)
        log.info("phase.changed", extra={"phase": record.phase.value, **detail})
        self.on_change()

    def _unhealthy(self, record: Record | None) -> str | None:
        if record is None or record.phase is not Phase.SOAKING:
            return None
        host = self._effects.host
        metrics = serving_metrics(host.metrics())
        return unhealthy_reason(
            record.desired.release_id, host.serving(), host.healthy(), self._baseline, metrics
        )

    def _settle(self, record: Record | None) -> None:
        if self._untidy:
            self._tidy(record)
            self._untidy = False
        serving = self._effects.host.serving() is not None
        if serving and not self._forgiven and self._now() - self._started_s >= _HEALTHY_RUN_S:
            self._state.forgive_exits()
            self._forgiven = True

    def _serve_again(self) -> None:
        if self._effects.host.serving() is None and self._now() >= self._restoring.not_before_s:
            self._ensure_serving()

    def _ensure_serving(self) -> None:
        """The committed release, else the one before it, without asking anyone."""
        record = self._record
        if record is None or self._effects.host.serving() is not None:
            return
        for release_id in filter(None, (record.committed, record.previous)):
            if self._stopping:
                return
            if self._restore(release_id):
                self._restoring.failures = 0
                return
        delay = self._restoring.backoff.delay_s(self._restoring.failures, self._random_unit())
        self._restoring.failures += 1
        self._restoring.not_before_s = self._now() + delay

    def _restore(self, release_id: str) -> bool:
        try:
            self._effects.serve(release_id, self._on_restoring)
        except RemoraError as e:
            detail = {"release": release_id, "error": str(e)}
            log.error("release.restore_failed", extra=detail)
            self._effects.emit("release.restore_failed", detail)
            return False
        return True

    def _on_restoring(self, what: str, fraction: float) -> None:
        """Only the end of the agent stops this: a newer assignment is no reason not to serve."""
        if self._stopping:
            raise Cancelled("the agent stops")

    def _on_progress(self, what: str, fraction: float) -> None:
        self._progress = fraction
        self._interrupt.check()

    def _interrupted(self, record: Record) -> bool:
        return self._stopping or self._record is not record


def _failure_event(effect: Effect) -> Event:
    return Event.REFUSED if effect is Effect.ADMIT else Event.FAILED


def _code(error: RemoraError) -> str:
    """The name of the error, or of the first refusal."""
    if isinstance(error, Incompatible) and error.refusals:
        return error.refusals[0].code
    return type(error).__name__


def _start_error(record: Record, event: Event, exits: int, last_words: str) -> tuple[str, str]:
    words = f"; its last log lines:\n{last_words}" if last_words else ""
    if event is Event.CRASH_LOOP:
        loop = f"the agent ended abnormally {exits} times running {record.committed}"
        alone = "; there is no earlier release to go back to, so nothing serves: roll out another"
        return "AbnormalExits", loop + ("" if record.previous else alone) + words
    if event is Event.FAILED:
        what = f"the agent or its machine went down {record.cut_runs} times while "
        return "AbnormalExits", what + record.phase.value + words
    if record.phase in (Phase.SWITCHING, Phase.SOAKING):
        return "Interrupted", f"the agent was stopped or killed while {record.phase.value}"
    return "", ""
