"""The composition root: constructs everything, opens the ports, stops gracefully.

fleet port      Fleet, Artifacts, Operator, health, reflection; mutual TLS, always
enrolment port  Enrolment; server TLS, presents leaf and CA
metrics port    Prometheus, plain HTTP on loopback
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from remora_contract.errors import Refused, RequestInvalid
from remora_controller.build_history import build_seconds
from remora_controller.counters import Counters
from remora_controller.driver import RolloutDriver
from remora_controller.experiments.automatic import AutoPromotion
from remora_controller.experiments.laboratory import Laboratory
from remora_controller.governance import Governance
from remora_controller.home import ControllerConfig, Home
from remora_controller.loop import DecisionLoop
from remora_controller.metrics import MetricsServer
from remora_controller.operations import Operations
from remora_controller.presence import Presence
from remora_controller.questions import Questions
from remora_controller.repository import Repository
from remora_controller.services.access import AccessInterceptor
from remora_controller.services.admission import Admission
from remora_controller.services.artifacts import ArtifactsService
from remora_controller.services.diagnostics import Asking, DiagnosticsService
from remora_controller.services.enrolment import EnrolmentService
from remora_controller.services.experiments import WholeOperatorService
from remora_controller.services.fleet import JITTER, FleetParts, FleetService, watched_interval_s
from remora_controller.services.operator import OperatorParts
from remora_controller.services.sharing import EngineSharingService
from remora_controller.sharing.depot import Depot
from remora_controller.sharing.desk import Desk, DeskParts
from remora_controller.sharing.roots import assigned_graphs
from remora_controller.sharing.shelves import Shelves
from remora_controller.sharing.tickets import Limits
from remora_controller.store.sqlite import SqliteStore
from remora_controller.store_thread import StoreThread
from remora_controller.sync_writer import SyncWriter
from remora_controller.watchers import Watchers
from remora_protos.control.v1 import (
    control_pb2,
    control_pb2_grpc,
    diagnostics_pb2,
    diagnostics_pb2_grpc,
    sharing_pb2,
    sharing_pb2_grpc,
)
from remora_protos.operator.v1 import operator_pb2, operator_pb2_grpc

log = logging.getLogger(__name__)
STOP_GRACE_S = 5.0
_SERVICES = ("Fleet", "Artifacts")
_FLEET_OPTIONS = (
    ("grpc.max_receive_message_length", 8 << 20),
    # Manifests of large bundles; chunks travel in small messages.
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),
)
_ENROLMENT_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 10),
    ("grpc.max_concurrent_streams", 8),
    ("grpc.so_reuseport", 0),
)


@dataclass(frozen=True)
class Ports:
    fleet: int
    enrolment: int
    metrics: int


class Controller:
    """One running controller. Made and used inside a running event loop."""

    def __init__(self, home: Home, config: ControllerConfig, repository: Path) -> None:
        self._home = home
        self._config = config
        self._authority = home.authority()
        self._store = SqliteStore(home.database)
        self._thread = StoreThread()
        self._counters = Counters()
        self._watchers = Watchers()
        self._questions = Questions()
        self._repository = Repository(repository, time.monotonic)
        self._presence = Presence(time.time(), config.offline_after_s)
        devices = self._store.devices()
        longest_wait_s = watched_interval_s(config.sync_interval_s, len(devices)) * (1 + JITTER)
        self._presence.load(devices, self._store.latest_metrics(), longest_wait_s)
        self._presence.tally.load(self._store.arm_counts())
        self._admission = Admission(self._store, self._thread, self._presence, time.time)
        self._operations = Operations(
            self._store,
            self._repository,
            self._presence,
            time.time,
            secrets.token_bytes,
            always_approve=config.rollouts_need_approval,
            sharing=config.engine_sharing,
        )
        self._depot = Depot(home.shared_engines, config.shared_engines_bytes)
        self._desk = self._make_desk()
        self._laboratory = Laboratory(self._store, self._operations, self._presence, time.time)
        auto = AutoPromotion(self._store, self._operations, self._laboratory, time.time)
        self._driver = RolloutDriver(self._store, self._presence, self._operations.contents_of)
        self._loop = DecisionLoop(
            self._store,
            self._thread,
            self._driver,
            self._presence,
            self._watchers,
            self._counters,
            time.time,
            also_prune=self._desk.prune,
            promote=auto.tick,
        )
        self._health = health.aio.HealthServicer()
        self._servers: list[grpc.aio.Server] = []
        self._metrics = MetricsServer(self._counters)
        self._deciding: asyncio.Task[None] | None = None

    async def start(self) -> Ports:
        """Opens the ports and begins to decide. Raises Refused when a port cannot be had."""
        fleet = await self._open(self._fleet_server(), self._config.listen, is_mutual=True)
        enrolment_server = self._enrolment_server(fleet)
        enrolment = await self._open(
            enrolment_server, self._config.enrolment_listen, is_mutual=False
        )
        metrics = await self._metrics.start(*split_address(self._config.metrics_listen))
        ports = Ports(fleet, enrolment, metrics)
        # What a former process had in memory when it died: who may have missed a rollout.
        for device in self._store.devices():
            self._loop.wake(device.device_id)
        self._deciding = asyncio.create_task(self._loop.run(), name="decisions")
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        self._write_ports(ports)
        log.info("controller.started", extra=vars(ports))
        return ports

    async def failed(self) -> None:
        """Waits for the decision loop to die, which it never should; raises what killed it."""
        if self._deciding is not None:
            await asyncio.shield(self._deciding)

    async def stop(self) -> None:
        """Graceful: calls under way end, streams are closed, memory is flushed."""
        await self._health.enter_graceful_shutdown()
        self._watchers.end_all()
        await asyncio.gather(*(server.stop(STOP_GRACE_S) for server in self._servers))
        self._loop.stop()
        if self._deciding is not None:
            await asyncio.gather(self._deciding, return_exceptions=True)
        await self._metrics.close()
        self._thread.close()
        self._store.close()
        self._home.listening.unlink(missing_ok=True)
        log.info("controller.stopped")

    def _fleet_server(self) -> grpc.aio.Server:
        access = AccessInterceptor(self._store, self._thread, time.time)
        server = grpc.aio.server(options=_FLEET_OPTIONS, interceptors=[access])
        fleet = FleetService(self._fleet_parts())
        control_pb2_grpc.add_FleetServicer_to_server(fleet, server)
        shelves = Shelves(self._repository, self._depot)
        artifacts = ArtifactsService(shelves, self._admission, self._count_fetched)
        control_pb2_grpc.add_ArtifactsServicer_to_server(artifacts, server)
        diagnostics = DiagnosticsService(self._questions, self._admission, time.time)
        diagnostics_pb2_grpc.add_DiagnosticsServicer_to_server(diagnostics, server)
        sharing = EngineSharingService(self._desk, self._depot, self._thread, self._admission)
        sharing_pb2_grpc.add_EngineSharingServicer_to_server(sharing, server)
        governance = Governance(self._store, self._operations, time.time)
        operator = WholeOperatorService(
            self._operator_parts(), governance, self._asking(), self._desk, self._laboratory
        )
        operator_pb2_grpc.add_OperatorServicer_to_server(operator, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        control = control_pb2.DESCRIPTOR.services_by_name
        names = [
            *(control[name].full_name for name in _SERVICES),
            *(s.full_name for s in diagnostics_pb2.DESCRIPTOR.services_by_name.values()),
            sharing_pb2.DESCRIPTOR.services_by_name["EngineSharing"].full_name,
            operator_pb2.DESCRIPTOR.services_by_name["Operator"].full_name,
            health.SERVICE_NAME,
            reflection.SERVICE_NAME,
        ]
        reflection.enable_server_reflection(names, server)
        return server

    def _make_desk(self) -> Desk:
        config = self._config
        parts = DeskParts(
            store=self._store,
            depot=self._depot,
            policy=config.engine_sharing,
            limits=Limits(lease_s=config.engine_lease_s, wait_s=config.engine_wait_s),
            clock=time.time,
            build_seconds=lambda: build_seconds(self._store),
            online=lambda: self._presence.count(),
            roots=lambda: assigned_graphs(self._store, self._repository),
        )
        return Desk(parts)

    def _fleet_parts(self) -> FleetParts:
        return FleetParts(
            store=self._store,
            thread=self._thread,
            writer=SyncWriter(self._store, self._thread),
            presence=self._presence,
            watchers=self._watchers,
            admission=self._admission,
            authority=self._authority,
            counters=self._counters,
            questions=self._questions,
            clock=time.time,
            sync_interval_s=self._config.sync_interval_s,
            on_news=self._loop.wake,
            random_unit=random.random,
            wants_samples=self._driver.wants_samples,
        )

    def _asking(self) -> Asking:
        return Asking(
            self._questions,
            self._store,
            self._thread,
            self._watchers,
            self._presence,
            time.time,
        )

    def _operator_parts(self) -> OperatorParts:
        return OperatorParts(
            operations=self._operations,
            store=self._store,
            thread=self._thread,
            presence=self._presence,
            repository=self._repository,
            watchers=self._watchers,
            authority=self._authority,
            clock=time.time,
            on_news=self._loop.wake,
            may_be_late=self._loop.wake,
        )

    def _enrolment_server(self, fleet_port: int) -> grpc.aio.Server:
        server = grpc.aio.server(options=_ENROLMENT_OPTIONS, maximum_concurrent_rpcs=64)
        service = EnrolmentService(
            self._store,
            self._thread,
            self._authority,
            self._counters,
            time.time,
            secrets.token_bytes,
            fleet_port,
            self._admission,
        )
        control_pb2_grpc.add_EnrolmentServicer_to_server(service, server)
        return server

    async def _open(self, server: grpc.aio.Server, address: str, *, is_mutual: bool) -> int:
        """The port it got."""
        split_address(address)
        pair = self._home.server_pair()
        credentials = grpc.ssl_server_credentials(
            [(pair.key, pair.certificate + self._authority.pem)],
            root_certificates=self._authority.pem if is_mutual else None,
            require_client_auth=is_mutual,
        )
        try:
            port = int(server.add_secure_port(address, credentials))
        except RuntimeError as e:
            raise Refused(f"cannot listen on {address}: is another program there?") from e
        if port == 0:
            raise Refused(f"cannot listen on {address}: is another program there?")
        await server.start()
        self._servers.append(server)
        return port

    def _count_fetched(self, count: int) -> None:
        self._counters.fetched_bytes += count

    def _write_ports(self, ports: Ports) -> None:
        """For scripts: which ports a `:0` became. Replaced as a whole."""
        temporary = self._home.listening.with_suffix(".tmp")
        temporary.write_text(json.dumps({**vars(ports), "pid": os.getpid()}) + "\n")
        temporary.replace(self._home.listening)


def split_address(address: str) -> tuple[str, int]:
    """`HOST:PORT` or `[V6]:PORT`. Raises RequestInvalid."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535 or not host:
        raise RequestInvalid(
            f"{address!r} is no address; write HOST:PORT, for example 0.0.0.0:7440"
        )
    return host.strip("[]"), int(port)
