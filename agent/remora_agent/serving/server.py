"""The gRPC server of one process: services, health and reflection on one address, in a thread of
its own with its own event loop. Owns the socket; the models behind the router are others' affair.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from remora_agent.serving.adapters_service import AdaptersService
from remora_agent.serving.address import Address, UnixAddress
from remora_agent.serving.descriptors import max_connections
from remora_agent.serving.driver import RequestDriver
from remora_agent.serving.engine_service import EngineService
from remora_agent.serving.health import HealthService
from remora_agent.serving.inference_service import InferenceService
from remora_agent.serving.kserve.service import KServeService
from remora_agent.serving.kserve.statistics import Statistics
from remora_agent.serving.legible import LegibleRequests
from remora_agent.serving.limits import MAX_MESSAGE_BYTES
from remora_agent.serving.listening import Listening
from remora_agent.serving.router import Router
from remora_agent.serving.served_model import ServedModel
from remora_agent.serving.tls import ServerTls
from remora_agent.serving.update_locks_service import UpdateLocksService
from remora_agent.serving.use_cases_service import UseCasesService
from remora_agent.serving.writing import STALL_S
from remora_agent.update_locks import LockBook
from remora_contract.errors import InternalFault, Refused, RemoraError
from remora_protos.inference.v1 import inference_pb2 as pb
from remora_protos.inference.v1 import inference_pb2_grpc as rpc
from remora_protos.kserve.pool import BothPools
from remora_protos.kserve.v2 import grpc_service_pb2 as kserve_pb
from remora_protos.kserve.v2 import grpc_service_pb2_grpc as kserve_rpc

log = logging.getLogger(__name__)

SERVICES = tuple(service.full_name for service in pb.DESCRIPTOR.services_by_name.values())
KSERVE = kserve_pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
# Text workers turn prompts into tokens; operation workers wait for disks and the step thread.
_TEXT_WORKERS = 2
_OPERATION_WORKERS = 4
_MAX_PENDING_CALLS = 16_384
_CONNECTIONS_TO_FILL = 4  # as many at least to take up all calls
_HANDSHAKE_MS = 60_000  # for a connection that has not yet said what it is
_FAREWELL_S = 1.0  # for what is still being sent when the models are drained


@dataclass(frozen=True)
class ServerOptions:
    address: Address
    tls: ServerTls | None = None
    unix_socket: UnixAddress | None = None  # beside `address`
    allowed_users: frozenset[int] | None = None  # of unix sockets; None: whom their mode lets in
    max_calls: int = 1024  # at a time, on all services; more are refused
    keepalive_s: float = 30.0  # a caller that vanished is noticed within about this time
    stall_s: float = STALL_S  # a stream of which nothing is read for so long ends
    kserve: bool = True  # the KServe v2 service too
    reflection: bool = True  # clients may ask for the services' descriptions
    update_locks: LockBook | None = None  # None: nobody updates this process

    @property
    def addresses(self) -> tuple[Address, ...]:
        return (self.address, *(() if self.unix_socket is None else (self.unix_socket,)))


class InferenceServer:
    """Started once, stopped once, from any thread."""

    def __init__(self, router: Router[ServedModel], options: ServerOptions) -> None:
        """Raises Refused off loopback without TLS, DocumentInvalid (a PEM file)."""
        self._router = router
        self._options = options
        self._services = (*SERVICES, KSERVE) if options.kserve else SERVICES
        self._listening = Listening(options.addresses, options.tls, options.allowed_users)
        self._text = ThreadPoolExecutor(_TEXT_WORKERS, "remora-text")
        self._operations = ThreadPoolExecutor(_OPERATION_WORKERS, "remora-operation")
        self._bound: Future[Address] = Future()
        self._stop: Callable[[], object] | None = None  # set while the thread listens
        self._thread = threading.Thread(target=self._run, name="remora-grpc")

    def start(self) -> Address:
        """Listens; port 0 becomes the one that was free. Raises Refused when it is taken."""
        self._thread.start()
        try:
            return self._bound.result()
        except RemoraError:
            self._thread.join()
            self._close_workers()
            raise

    def stop(self) -> None:
        """Ends calls that still run and frees the address. Drain the models before."""
        if self._stop is not None:
            self._stop()
            self._thread.join()
            self._stop = None
        self._close_workers()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        finally:
            # No except clause: the traceback of a bug goes to threading.excepthook as it is.
            if not self._bound.done():
                self._bound.set_exception(
                    InternalFault("the gRPC server did not start; the log says why")
                )

    async def _serve(self) -> None:
        server, loop, stop = self._make_server(), asyncio.get_running_loop(), asyncio.Event()
        try:
            bound = self._listening.bind(server)
            healths = self._add_services(server)
            await server.start()
            await self._listening.open()
        except Refused as e:
            await server.stop(None)
            await self._listening.close()
            self._bound.set_exception(e)
            return
        for address in bound:
            log.info("serving.listening", extra={"address": address.target()})
        self._stop = lambda: loop.call_soon_threadsafe(stop.set)
        self._bound.set_result(bound[0])
        watch = asyncio.ensure_future(self._report_health(healths))
        await stop.wait()
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        await server.stop(_FAREWELL_S)
        await self._listening.close()

    def _make_server(self) -> Any:
        keepalive_ms = int(self._options.keepalive_s * 1000)
        return grpc.aio.server(
            interceptors=[LegibleRequests()],
            maximum_concurrent_rpcs=self._options.max_calls,
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),  # a taken port is an error, not a shared one
                ("grpc.max_allowed_incoming_connections", max_connections()),
                # A caller that begins calls and never sends their messages holds them as long as it
                # likes: one connection must not hold all. Its further calls wait on its own side.
                ("grpc.max_concurrent_streams", self._options.max_calls // _CONNECTIONS_TO_FILL),
                # Else calls of a burst that come before the caller has heard of this are reset.
                ("grpc.http.overload_protection", 0),
                ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
                ("grpc.keepalive_time_ms", keepalive_ms),
                ("grpc.keepalive_timeout_ms", keepalive_ms // 3),
                # Calls of a burst that Python has not picked up yet. Beyond, the core resets them
                # without a word, which a caller takes for a cancellation.
                ("grpc.server.max_pending_requests", _MAX_PENDING_CALLS),
                ("grpc.server.max_pending_requests_hard_limit", _MAX_PENDING_CALLS),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ],
        )

    def _add_services(self, server: Any) -> HealthService:
        router, stall_s = self._router, self._options.stall_s
        driver = RequestDriver(router, self._text)
        rpc.add_InferenceServicer_to_server(InferenceService(router, driver, stall_s), server)
        rpc.add_AdaptersServicer_to_server(AdaptersService(router, self._operations), server)
        rpc.add_UseCasesServicer_to_server(UseCasesService(router), server)
        rpc.add_EngineServiceServicer_to_server(EngineService(router), server)
        locks = UpdateLocksService(self._options.update_locks)
        rpc.add_UpdateLocksServicer_to_server(locks, server)
        if self._options.kserve:
            statistics = Statistics(time.monotonic_ns, time.time_ns)
            service = KServeService(router, driver, self._operations, statistics, stall_s)
            kserve_rpc.add_GRPCInferenceServiceServicer_to_server(service, server)
        healths = HealthService(("", *self._services))
        health_pb2_grpc.add_HealthServicer_to_server(healths, server)
        if self._options.reflection:
            names = (*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server, BothPools())
        return healths

    async def _report_health(self, healths: HealthService) -> None:
        """Keeps grpc.health.v1 true: serving while new calls are let in."""
        told = None
        while True:
            state = self._router.state
            if state != told:
                status = health_pb2.HealthCheckResponse
                value = status.SERVING if state == "serving" else status.NOT_SERVING
                for name in ("", *self._services):
                    healths.set(name, value)
                told = state
            await asyncio.sleep(0.1)

    def _close_workers(self) -> None:
        self._text.shutdown(wait=False)
        self._operations.shutdown(wait=False)
