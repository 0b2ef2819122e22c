"""The Sync loop: report what is, hear what should be, forget what the controller has stored.

One thread. An unreachable controller costs nothing but freshness: the loop backs off with full
jitter while the device serves on and the spools fill. Decides nothing about activation.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from remora_agent.control.client import ControllerClient
from remora_agent.control.download_share import DownloadShare
from remora_agent.control.facts import gpu_facts, machine_facts
from remora_agent.control.held import HeldArtifacts
from remora_agent.control.layout import StateLayout
from remora_agent.control.pacing import Backoff
from remora_agent.control.reconcile import Reconciler
from remora_agent.control.spool import EventSpool
from remora_agent.control.wire import (
    desired_from,
    event_messages,
    metric_messages,
    next_sync_s,
    reported,
    sample_every_s,
)
from remora_agent.host import ServingHost
from remora_agent.telemetry.spool import MetricSpool
from remora_contract.device_phase import Phase
from remora_contract.errors import (
    DocumentInvalid,
    Exhausted,
    Forbidden,
    Refused,
    RemoraError,
    Unavailable,
)
from remora_protos.control.v1 import control_pb2 as pb
from remora_protos.control.v1.diagnostics_pb2 import DiagnosticRequest

log = logging.getLogger(__name__)
_EVENTS_PER_SYNC = 200
_METRICS_PER_SYNC = 1000
# While a phase with visible progress lasts, the operator sees it move.
_PROGRESS_SYNC_S = 2.0
_MOVING = frozenset({Phase.STAGING, Phase.BUILDING, Phase.PROVING})
_QUARANTINE_SYNC_S = 60.0
_FULL_DISK_SYNC_S = 10.0


@dataclass(frozen=True)
class Spools:
    events: EventSpool
    metrics: MetricSpool


class SyncLoop:
    def __init__(
        self,
        client: ControllerClient,
        reconciler: Reconciler,
        host: ServingHost,
        spools: Spools,
        layout: StateLayout,
        labels: dict[str, str],
        boot_id: str,
        random_unit: Callable[[], float],
        backoff: Backoff,
        after_sync: Callable[[], None] = lambda: None,
        after_failure: Callable[[], None] = lambda: None,
        on_windows: Callable[[Sequence[str]], None] = lambda windows: None,
        unix_now: Callable[[], float] = time.time,
    ) -> None:
        """`after_sync` and `after_failure` run on the loop's thread after each exchange;
        `on_windows` hears in each when the device may switch, `on_questions` what the controller
        would like to know."""
        self._client, self._reconciler, self._host = client, reconciler, host
        self._spools, self._layout, self._labels = spools, layout, labels
        self._boot_id, self._random_unit, self._backoff = boot_id, random_unit, backoff
        self.after_sync, self.after_failure = after_sync, after_failure
        self.on_windows, self._unix_now = on_windows, unix_now
        self.on_questions: Callable[[Sequence[DiagnosticRequest]], None] = lambda questions: None
        self.held: HeldArtifacts | None = None  # told where it is set
        self.share: DownloadShare | None = None  # likewise
        self.settings = pb.DeviceFacts()  # what of the facts the configuration says
        self._seq = 0
        self._failures = 0
        self._quarantined = False
        self._poked = threading.Event()
        self._stopping = False

    def poke(self) -> None:
        """Sync now, from any thread."""
        self._poked.set()

    def stop(self) -> None:
        self._stopping = True
        self._poked.set()

    def use(self, client: ControllerClient) -> None:
        """From the next Sync on; for a renewed certificate."""
        self._client = client

    def run(self) -> None:
        while True:
            self._poked.clear()
            if self._stopping:  # looked at after the clear: a stop is never slept through
                return
            self._poked.wait(self.once())

    def once(self) -> float:
        """One exchange. Returns seconds until the next."""
        try:
            wait_s = self._exchange(self._client)
        except (Refused, Forbidden) as e:
            return self._set_aside(e)
        except RemoraError as e:
            delay_s = self._backoff.delay_s(self._failures, self._random_unit())
            self._log_failure(e, delay_s)
            self._failures += 1
            self.after_failure()
            return delay_s
        if self._failures or self._quarantined:
            log.info("controller.reached", extra={"failures": self._failures})
        self._failures, self._quarantined = 0, False
        self.after_sync()
        return wait_s

    def exchange_with(self, client: ControllerClient) -> None:
        """Proves that a client works: one Sync through it, on the loop's thread. Raises what the
        call raises."""
        self._exchange(client)

    def _exchange(self, client: ControllerClient) -> float:
        events = self._spools.events.oldest(_EVENTS_PER_SYNC)
        more = self._spools.metrics.waiting() >= _METRICS_PER_SYNC
        samples, mark = self._spools.metrics.batch(_METRICS_PER_SYNC)
        report = self._reconciler.report()
        record = report.record
        self._seq += 1
        request = pb.SyncRequest(
            facts=self._facts(),
            labels=self._labels,
            reported=reported(report, self._host.serving()),
            seq=self._seq,
            boot_id=self._boot_id,
            events=event_messages(events),
            metrics=metric_messages(samples),
            known_generation=0 if record is None else record.desired.generation,
            sent_at_unix_s=self._unix_now(),
        )
        if self.held is not None:
            self.held.put_into(request)
        asked_s = 0.0 if self.share is None else self.share.put_into(request)
        answer = client.sync(request)
        if self.share is not None:
            self.share.answered(request, answer, asked_s)
        try:
            if self.held is not None:
                self.held.answered(request, answer)
            self._spools.events.stored_up_to(answer.events_stored_up_to)
            self._spools.metrics.sent(mark)
            self._spools.metrics.thin(sample_every_s(answer))
            self.on_windows(answer.maintenance_windows)
            self.on_questions(answer.diagnostics)
            self._take(answer)
        except Exhausted as e:
            # Nothing is lost: the controller is told the same again and answers the same again.
            log.error("state_dir.full", extra={"cause": str(e)})
            return _FULL_DISK_SYNC_S
        return self._wait_s(answer, more=more)

    def _facts(self) -> pb.DeviceFacts:
        facts = machine_facts(self._layout.root)
        facts.engine_key.update(self._host.engine_key())
        facts.MergeFrom(gpu_facts(self._host.gpu_memory()))
        facts.MergeFrom(self.settings)
        return facts

    def _take(self, answer: pb.SyncResponse) -> None:
        if answer.WhichOneof("answer") != "desired":
            return
        try:
            desired = desired_from(answer.desired)
        except DocumentInvalid as e:
            log.error("assignment.invalid", extra={"cause": str(e)})
            return
        self._reconciler.assign(desired)

    def _wait_s(self, answer: pb.SyncResponse, more: bool) -> float:
        wait_s = next_sync_s(answer)
        report = self._reconciler.report()
        if more:
            return min(wait_s, 0.1)
        is_moving = report.record is not None and report.record.phase in _MOVING
        if is_moving and report.hold is None:
            return min(wait_s, _PROGRESS_SYNC_S)
        return wait_s

    def _set_aside(self, error: RemoraError) -> float:
        """Quarantined or removed: serve on, ask rarely, say it once."""
        if not self._quarantined:
            log.error("controller.refused", extra={"cause": str(error)})
        self._quarantined = True
        return _QUARANTINE_SYNC_S * (0.5 + self._random_unit())

    def _log_failure(self, error: RemoraError, delay_s: float) -> None:
        extra = {"cause": str(error), "error": type(error).__name__, "retry_in_s": delay_s}
        if isinstance(error, Unavailable) and self._failures > 0:
            log.debug("controller.unreachable", extra=extra)
        else:
            log.warning("controller.unreachable", extra=extra)
