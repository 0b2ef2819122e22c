"""Sync, Watch, Renew: what devices say and what they are told.

Sync is the truth. Its answer is read from the store, after what the device said is durable there.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

from remora_contract.device_phase import FINAL, Phase
from remora_contract.errors import NotFound, Refused, RequestInvalid
from remora_contract.held import Held
from remora_contract.windows import windows_of
from remora_controller import pki
from remora_controller.bandwidth import BandwidthBook, share_for_s
from remora_controller.clones import CloneFound, follow
from remora_controller.counters import Counters
from remora_controller.domain import Assignment, BootTrail, Device, RolloutSpec, SyncRecord
from remora_controller.presence import Presence
from remora_controller.questions import Questions
from remora_controller.services.admission import Admission, quarantine_message
from remora_controller.services.calls import Context, caller, streaming, unary
from remora_controller.services.diagnostics import requests_of
from remora_controller.services.wire import (
    clock_ahead_s,
    desired_of,
    events_of,
    facts_of,
    fetching_of,
    held_of,
    labels_of,
    metrics_of,
    report_of,
)
from remora_controller.store.protocol import Store
from remora_controller.store_thread import StoreThread
from remora_controller.sync_writer import SyncWriter
from remora_controller.watchers import Watchers
from remora_protos.control.v1 import control_pb2 as pb
from remora_protos.control.v1 import control_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)
# One controller process answers about a thousand Syncs a second: larger fleets ask less often.
SYNCS_PER_S = 300.0
BUSY_SYNC_S = 2.0
# A device whose Watch stream is open is poked when it should Sync: all that rest so ask so often
# together, and none of them less often than by this factor. A thousand then cost 2 % of a core.
CALM_SYNCS_PER_S = 5.5
WATCHED_FACTOR = 18.0
MAX_SYNC_S = 3600.0  # agents take no more
# Devices that came back in one second (a mass reconnect) must not come together for ever.
JITTER = 0.25
MAX_REMEMBERED = 1000  # rollouts
DISK_NEWS_BYTES = 64 << 20
_NO_ROLLOUT = RolloutSpec()


@dataclass(frozen=True)
class FleetParts:
    """What the service works with; made by the composition root."""

    store: Store
    thread: StoreThread
    writer: SyncWriter
    presence: Presence
    watchers: Watchers
    admission: Admission
    authority: pki.Authority
    counters: Counters
    questions: Questions
    clock: Callable[[], float]
    sync_interval_s: float
    on_news: Callable[[str | None], None]  # wakes the decision loop; a device may be late
    random_unit: Callable[[], float]
    wants_samples: Callable[[str], bool]  # whether gates wait for what the device measures


class FleetService(pb_grpc.FleetServicer):
    def __init__(self, parts: FleetParts) -> None:
        self._parts = parts
        self._releases: dict[str, bytes] = {}  # immutable documents, by id
        self._specs: dict[str, RolloutSpec] = {}  # of rollouts, which never change either
        self._bandwidth = BandwidthBook(parts.clock())

    @unary
    async def Sync(self, request: pb.SyncRequest, context: Context) -> pb.SyncResponse:
        parts, now = self._parts, self._parts.clock()
        parts.counters.syncs += 1
        identity = caller(context, pki.Role.DEVICE)
        device, assignment = await parts.admission.known_device_and_assignment(identity)
        was_online = parts.presence.is_online(device.device_id, now)
        trail = await self._follow(device, request, now)
        record = SyncRecord(
            device_id=device.device_id,
            facts=facts_of(request.facts),
            device_labels=labels_of(request.labels),
            report=report_of(request.reported),
            trail=trail,
            seen_at=now,
            events=events_of(request.events, now),
            held=_held(device, request),
        )
        ahead_s = parts.presence.ahead_s(device.device_id, clock_ahead_s(request, now))
        metrics = metrics_of(request.metrics, device.device_id, now, ahead_s)
        has_news = _has_news(device, record)
        # First: when it is decided about what the device reports, what it measured is known too.
        parts.presence.add_metrics(device.device_id, metrics)
        if record.held is not None:
            device = replace(device, held=record.held)
        if has_news:
            await parts.writer.write(record)
            assignment = await parts.thread.call(parts.store.assignment, device.device_id)
        parts.presence.seen(device.device_id, trail, now, is_stored=has_news)
        if has_news or not was_online:
            may_be_late = not was_online or record.device_labels != device.device_labels
            parts.on_news(device.device_id if may_be_late else None)
        return await self._answer(request, device, record, assignment)

    async def _follow(self, device: Device, request: pb.SyncRequest, now: float) -> BootTrail:
        """Raises RequestInvalid without a boot id, Refused (and quarantines) for a clone."""
        if not 0 < len(request.boot_id) <= 128 or request.seq >= 1 << 63:
            raise RequestInvalid("Sync needs a boot_id (at most 128 characters) and a seq")
        known = self._parts.presence.trail(device.device_id)
        found = follow(known, request.boot_id, request.seq)
        if isinstance(found, CloneFound):
            reason = f"{found.reason}; now on {request.facts.hostname[:64] or 'an unnamed host'}"
            log.warning("device.quarantined", extra={"device": device.device_id, "reason": reason})
            store = self._parts.store
            await self._parts.thread.call(store.quarantine, device.device_id, reason, now)
            self._parts.on_news(None)
            raise Refused(quarantine_message(device.device_id, reason))
        # Set before the first await that follows, so that two calls at once are compared too.
        self._parts.presence.seen(device.device_id, found.trail, now, is_stored=False)
        return found.trail

    async def _answer(
        self,
        request: pb.SyncRequest,
        device: Device,
        record: SyncRecord,
        assignment: Assignment | None,
    ) -> pb.SyncResponse:
        stored = max([device.events_up_to, *(e.seq for e in record.events)])
        interval = self._next_sync_s(device.device_id, assignment)
        self._parts.presence.awaits(device.device_id, record.seen_at, interval)
        labels = {**record.device_labels, **device.operator_labels}
        spec = await self._spec(assignment)
        response = pb.SyncResponse(
            next_sync_after_s=interval,
            events_stored_up_to=stored,
            maintenance_windows=windows_of(labels) or spec.windows,
            diagnostics=requests_of(
                self._parts.questions.waiting(device.device_id, self._parts.clock())
            ),
            sample_every_s=self._sample_every_s(device.device_id, assignment),
            wants_held=device.held.fingerprint != request.held_fingerprint,
        )
        if assignment is None or assignment.generation == request.known_generation:
            response.not_modified.SetInParent()
        else:
            document = await self._document(assignment)
            shares = spec.total_bytes_per_s is not None
            response.desired.CopyFrom(desired_of(assignment, document, shares_bandwidth=shares))
        self._share_bandwidth(request, response, assignment, spec, record.seen_at)
        return response

    def _share_bandwidth(
        self,
        request: pb.SyncRequest,
        response: pb.SyncResponse,
        assignment: Assignment | None,
        spec: RolloutSpec,
        now: float,
    ) -> None:
        if assignment is None or assignment.rollout_id is None or spec.total_bytes_per_s is None:
            return
        rollout_id, device_id = assignment.rollout_id, assignment.device_id
        if not request.HasField("fetching"):
            self._bandwidth.end(rollout_id, device_id)
            return
        limit, held = fetching_of(request.fetching)
        for_s, total = share_for_s(response.next_sync_after_s), spec.total_bytes_per_s
        granted = self._bandwidth.share(rollout_id, total, device_id, limit, held, now, for_s)
        response.download_share.bytes_per_s = granted
        response.download_share.for_s = for_s

    def _next_sync_s(self, device_id: str, assignment: Assignment | None) -> float:
        """Sooner while the device is changing; later the larger the fleet, and while a stream is
        open through which it is told of news and no rollout's gates wait for its metrics."""
        parts = self._parts
        at_least = parts.presence.count() / SYNCS_PER_S
        # Whoever waits for the night need not say so every other second.
        calm = FINAL | {Phase.WAIT_WINDOW}
        is_busy = assignment is not None and assignment.phase not in calm
        if is_busy:
            return min(MAX_SYNC_S, max(min(parts.sync_interval_s, BUSY_SYNC_S), at_least))
        if device_id in parts.watchers and not parts.wants_samples(device_id):
            wanted = watched_interval_s(parts.sync_interval_s, parts.presence.count())
        else:
            wanted = parts.sync_interval_s
        return min(MAX_SYNC_S, spread_s(max(wanted, at_least), parts.random_unit()))

    def _sample_every_s(self, device_id: str, assignment: Assignment | None) -> float:
        """Every sample where a gate may want it, else about one with each Sync of a device that can
        be poked: in a fleet at rest samples would cost more than all else."""
        parts = self._parts
        is_calm = assignment is None or assignment.phase in FINAL
        if not is_calm or parts.wants_samples(device_id):
            return 0.0
        return watched_interval_s(parts.sync_interval_s, parts.presence.count())

    async def _spec(self, assignment: Assignment | None) -> RolloutSpec:
        """Of the rollout that assigned it; one that asks for nothing where there is none."""
        rollout_id = None if assignment is None else assignment.rollout_id
        if rollout_id is None:
            return _NO_ROLLOUT
        if rollout_id not in self._specs:
            rollout = await self._parts.thread.call(self._parts.store.rollout, rollout_id)
            if len(self._specs) >= MAX_REMEMBERED:
                self._specs.clear()
            self._specs[rollout_id] = rollout.spec if rollout is not None else _NO_ROLLOUT
        return self._specs[rollout_id]

    async def _document(self, assignment: Assignment) -> bytes:
        release_id = assignment.release_id
        if release_id is None:
            return b""
        if release_id not in self._releases:
            record = await self._parts.thread.call(self._parts.store.release, release_id)
            if record is None:
                raise NotFound(f"release {release_id} is assigned and not stored")
            self._releases[release_id] = record.document
        return self._releases[release_id]

    @streaming
    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.Poke]:
        parts = self._parts
        device = await parts.admission.known_device(caller(context, pki.Role.DEVICE))
        queue = parts.watchers.open(device.device_id)
        if not parts.presence.is_online(device.device_id, parts.clock()):
            # From here on it counts as online: its Sync will not tell any more that it was away.
            parts.on_news(device.device_id)
        # It may have been told of a long interval before: this contact counts like a Sync.
        interval = watched_interval_s(parts.sync_interval_s, parts.presence.count()) * (1 + JITTER)
        parts.presence.awaits(device.device_id, parts.clock(), interval)
        try:
            # A poke between the device's last Sync and now would be lost: say where we are.
            newest = await parts.thread.call(parts.store.assignment, device.device_id)
            if newest is not None:
                yield pb.Poke(generation=newest.generation)
            while (generation := await queue.get()) is not None:
                yield pb.Poke(generation=generation)
        finally:
            if parts.watchers.close(device.device_id, queue):
                parts.presence.left(device.device_id, parts.clock())

    @unary
    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewResponse:
        identity = caller(context, pki.Role.DEVICE)
        device = await self._parts.admission.known_device(identity)
        if pki.load_request(request.csr_pem).key_fingerprint != identity.key_fingerprint:
            raise RequestInvalid(
                "renewal is for the key that authenticates the call; to change the key, join again"
            )
        now = pki.utc(self._parts.clock())
        authority = self._parts.authority
        certificate = authority.issue(request.csr_pem, pki.Role.DEVICE, device.device_id, now)
        log.info("device.renewed", extra={"device": device.device_id})
        return pb.RenewResponse(certificate_pem=certificate, ca_pem=authority.pem)


def spread_s(interval_s: float, random_unit: float) -> float:
    """The same on average; `random_unit` is uniform in [0, 1)."""
    return interval_s * (1 - JITTER + 2 * JITTER * random_unit)


def watched_interval_s(sync_interval_s: float, devices: int) -> float:
    """How often a device at rest reports while its Watch stream is open."""
    most = min(MAX_SYNC_S, WATCHED_FACTOR * sync_interval_s)
    return min(most, max(sync_interval_s, devices / CALM_SYNCS_PER_S))


def _held(device: Device, request: pb.SyncRequest) -> Held | None:
    """None: what is stored still holds, or it is not told what does."""
    if request.HasField("held"):
        return held_of(request.held)
    holds_nothing = request.held_fingerprint == 0 and device.held != Held()
    return Held() if holds_nothing else None


def _has_news(device: Device, record: SyncRecord) -> bool:
    """Free disk space moves all the time: only a change that a plan could notice counts."""
    known, now = device.facts.disk_free_bytes, record.facts.disk_free_bytes
    facts = replace(record.facts, disk_free_bytes=known)
    return (
        facts != device.facts
        or _disk_is_news(known, now)
        or device.report != record.report
        or record.held not in (None, device.held)
        or device.device_labels != dict(record.device_labels)
        or any(e.seq > device.events_up_to for e in record.events)
    )


def _disk_is_news(known: int, now: int) -> bool:
    """Where little is free, little matters."""
    return abs(now - known) > min(DISK_NEWS_BYTES, max(known, now) // 4)
