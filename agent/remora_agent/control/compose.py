"""Constructs the control side around a serving host: the one place that knows every class."""

from __future__ import annotations

import logging
import random
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from remora_agent.config import AgentConfig, LimitsConfig, ServingConfig
from remora_agent.control.agent import Parts, Telemetry
from remora_agent.control.client import ControllerClient
from remora_agent.control.diagnostics import Diagnostics, doctor_report
from remora_agent.control.download_share import DownloadShare
from remora_agent.control.effects import Effects, Emit
from remora_agent.control.facts import setting_facts
from remora_agent.control.fetch import ChunkFetcher, Pace
from remora_agent.control.held import HeldArtifacts
from remora_agent.control.holds import Holds
from remora_agent.control.identity import Identity
from remora_agent.control.interrupt import Interrupt
from remora_agent.control.kept_log import kept_lines
from remora_agent.control.layout import StateLayout
from remora_agent.control.pacing import Backoff, RateLimit
from remora_agent.control.reconcile import Reconciler
from remora_agent.control.renewal import Keeper, Renewal
from remora_agent.control.sharing.obtain import EngineSharing, ImpatientPace
from remora_agent.control.sharing.pending import PendingStore
from remora_agent.control.sharing.upload import Sharer
from remora_agent.control.spool import EventSpool
from remora_agent.control.staging import Stager
from remora_agent.control.state import Database, DeviceState
from remora_agent.control.sync import Spools, SyncLoop
from remora_agent.control.watch import Watcher
from remora_agent.host import ServingHost
from remora_agent.telemetry.sampler import Opener, Sampler
from remora_agent.telemetry.sources import device_openers
from remora_agent.telemetry.spool import MetricSpool
from remora_agent.update_locks import LockBook
from remora_contract.errors import Exhausted
from remora_contract.memory_need import Sizing

log = logging.getLogger(__name__)
_KERNEL_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Timing:
    """Delays that tests shorten."""

    backoff: Backoff = field(default_factory=lambda: Backoff(base_s=1.0, cap_s=60.0))
    fetch_backoff: Backoff = field(default_factory=lambda: Backoff(base_s=0.5, cap_s=30.0))


class SwappableSource:
    """The chunk source behind the client in use, which a renewal replaces."""

    def __init__(self, client: ControllerClient) -> None:
        self.client = client

    def manifest(self, digest: str) -> bytes:
        return self.client.manifest(digest)

    def fetch(self, chunk_digest: str, offset: int, length: int) -> Iterator[bytes]:
        return self.client.fetch(chunk_digest, offset, length)


def compose(
    config: AgentConfig,
    identity: Identity,
    host: ServingHost,
    timing: Timing | None = None,
    openers: list[Opener] | None = None,
    last_words: str = "",
) -> Parts:
    """Everything `Agent` runs. The state directory must be locked (`layout.exclusive`).

    `last_words`: the end of the last run's log."""
    timing = timing or Timing()
    layout = StateLayout(Path(config.state_dir))
    layout.create()
    database = Database(layout.database)
    state = DeviceState(database)
    events = EventSpool(database, config.telemetry.spool_events, time.time())
    metrics = MetricSpool(database, config.telemetry.spool_samples)
    client = ControllerClient(identity, config.controller.address)
    source = SwappableSource(client)
    interrupt = Interrupt()
    pace = Pace(interrupt, time.monotonic, random.random, timing.fetch_backoff)
    rate = RateLimit(config.limits.download_bytes_per_s, time.monotonic())
    share = DownloadShare(config.limits.download_bytes_per_s, time.monotonic)
    rate.shared = share.rate
    stager = _stager(config.limits, layout, source, pace, rate, share)
    emit = _emitter(events)
    pending = PendingStore(database)
    impatient = ImpatientPace(interrupt, time.monotonic, random.random, timing.fetch_backoff)
    engines = _stager(config.limits, layout, source, impatient, rate, share)
    origins = EngineSharing(lambda: source.client.sharing, host, engines, pace, pending, emit)
    sizing = _sizing(config.serving)
    pinned = config.limits.pinned_releases
    effects = Effects(layout, host, stager, emit, origins, sizing, pinned)
    locks = LockBook(layout.update_locks, time.time, config.limits.max_lock_s)
    holds = Holds(database, locks, time.time)
    reconciler = Reconciler(
        state,
        effects,
        interrupt,
        time.monotonic,
        random.random,
        pinned,
        holding=lambda record: holds.holding(record) or origins.holding(record),
        last_words=last_words,
    )
    sync = SyncLoop(
        client,
        reconciler,
        host,
        Spools(events, metrics),
        layout,
        config.labels,
        uuid.uuid4().hex,
        random.random,
        timing.backoff,
    )
    sync.held = HeldArtifacts(layout, host, lambda: reconciler.report().record, pinned)
    sync.share, share.on_change = share, sync.poke
    sync.settings = setting_facts(sizing, config.limits.disk_floor_bytes)
    sharer = _sharer(config, source, host, layout, pending, reconciler, emit, timing)
    pending.on_change = sharer.poke

    def changed() -> None:
        sync.poke()
        sharer.poke()

    reconciler.on_change = changed
    sync.on_windows = holds.set_windows
    diagnostics = _diagnostics(config, layout)
    sync.on_questions = diagnostics.take
    watch = Watcher(client, sync.poke, random.random, timing.backoff)
    sampler = Sampler(openers or device_openers(layout.root), host.metrics, time.monotonic)
    interval_s = config.telemetry.interval_s
    parts = Parts(
        database=database,
        state=state,
        reconciler=reconciler,
        host=host,
        sync=sync,
        watch=watch,
        telemetry=Telemetry(sampler, metrics, interval_s, time.time, lambda: events.dropped),
        sharer=sharer,
        client=client,
        diagnostics=diagnostics,
        drain_s=config.serving.drain_s,
        kernel_boot_id=_KERNEL_BOOT_ID.read_text().strip(),
    )
    diagnostics.deliver = lambda answer: parts.client.deliver(answer)
    keeper = _keeper(config, identity, layout, parts, source)
    sync.after_sync, sync.after_failure = keeper.after_sync, keeper.after_failure
    return parts


def _sizing(serving: ServingConfig) -> Sizing:
    return Sizing(
        serving.backend,
        serving.rows,
        serving.context,
        serving.memory_floor_bytes,
        serving.prefill,
    )


def _diagnostics(config: AgentConfig, layout: StateLayout) -> Diagnostics:
    return Diagnostics(
        {
            "doctor": lambda request: doctor_report(config),
            "logs": lambda request: kept_lines(layout.kept_log, request.since_unix_s),
        }
    )


def _stager(
    limits: LimitsConfig,
    layout: StateLayout,
    source: SwappableSource,
    pace: Pace,
    rate: RateLimit,
    share: DownloadShare,
) -> Stager:
    fetcher = ChunkFetcher(layout.root, source, pace, rate, share)
    return Stager(layout, source, fetcher, pace, limits.disk_floor_bytes)


def _sharer(
    config: AgentConfig,
    source: SwappableSource,
    host: ServingHost,
    layout: StateLayout,
    pending: PendingStore,
    reconciler: Reconciler,
    emit: Emit,
    timing: Timing,
) -> Sharer:
    # An interrupt of its own: a newer assignment stops downloads and builds, but no upload.
    pace = Pace(Interrupt(), time.monotonic, random.random, timing.fetch_backoff)
    return Sharer(
        lambda: source.client.sharing,
        host,
        layout,
        pending,
        lambda: reconciler.report().record,
        pace,
        RateLimit(config.limits.download_bytes_per_s, time.monotonic()),
        emit,
    )


def _emitter(events: EventSpool) -> Emit:
    def emit(name: str, detail: Mapping[str, object]) -> None:
        try:
            events.add(name, time.time(), detail)
        except Exhausted as e:
            log.warning("event.lost", extra={"lost_event": name, "cause": str(e)})

    return emit


def _keeper(
    config: AgentConfig,
    identity: Identity,
    layout: StateLayout,
    parts: Parts,
    source: SwappableSource,
) -> Keeper:
    def adopt(client: ControllerClient) -> None:
        old, parts.client, source.client = parts.client, client, client
        parts.sync.use(client)
        parts.watch.use(client)
        old.close()

    renewal = Renewal(
        layout.identity,
        connect=lambda fresh: ControllerClient(fresh, config.controller.address),
        prove=parts.sync.exchange_with,
        adopt=adopt,
    )
    address = config.controller.enrolment_address or identity.enrolment
    return Keeper(
        identity,
        renewal,
        lambda: parts.client,
        address,
        lambda: datetime.now(timezone.utc),
        time.monotonic,
    )
