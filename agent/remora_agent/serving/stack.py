"""The serving half of an agent process put together: router, host, gRPC server, metrics.

The one place of this half that constructs concrete classes; `serve` and `run` both use it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from remora_agent.engine.build import never
from remora_agent.hosting.engines import CachedEngines, EngineSettings, EngineSource
from remora_agent.hosting.models import ModelOpener
from remora_agent.local_host import HostSettings, LocalHost
from remora_agent.serving.address import (
    DEFAULT_LISTEN,
    Address,
    TcpAddress,
    UnixAddress,
    parse_address,
)
from remora_agent.serving.openai.settings import OpenAiOptions
from remora_agent.serving.router import Router
from remora_agent.serving.served_model import ServedModel
from remora_agent.serving.server import InferenceServer, ServerOptions
from remora_agent.serving.tls import ServerTls
from remora_agent.serving.writing import STALL_S
from remora_agent.telemetry.observers import Observers, Observing
from remora_agent.telemetry.prometheus import MetricsServer
from remora_agent.telemetry.serving import serving_readings
from remora_agent.telemetry.source import Reading
from remora_agent.update_locks import LockBook
from remora_contract.errors import Refused, Unsupported

if TYPE_CHECKING:
    from remora_agent.edgellm.source import EdgeEngines
    from remora_agent.serving.openai.server import OpenAiServer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StackOptions:
    listen: Address = field(default_factory=lambda: parse_address(DEFAULT_LISTEN))
    tls: ServerTls | None = None
    engines: EngineSettings = field(default_factory=EngineSettings)
    host: HostSettings = field(default_factory=HostSettings)
    metrics_listen: TcpAddress | None = None
    observing: Observing = field(default_factory=Observing)
    reflection: bool = True
    unix_socket: UnixAddress | None = None  # beside `listen`
    allowed_users: frozenset[int] | None = None  # of unix sockets; None: whom their mode lets in
    kserve: bool = True  # the KServe v2 service on the same address
    openai: OpenAiOptions | None = None  # None: no HTTP surface
    stall_s: float = STALL_S  # a gRPC stream of which nothing is read for so long ends
    update_locks: LockBook | None = None  # None: nobody updates this process


class ServingStack:
    """`start`, then hand `host` its assignments, then `stop`."""

    def __init__(
        self,
        options: StackOptions,
        cancelled: Callable[[], bool] | None = None,
        engines: EngineSource | None = None,
    ) -> None:
        """`cancelled` is asked during engine builds; `engines` None are the device's own.

        Raises Unsupported where the backend is not installed, Refused off loopback without TLS
        or for traces without their packages, DocumentInvalid (a PEM file), Exhausted (disk).
        """
        self._options = options
        router: Router[ServedModel] = Router()
        server = ServerOptions(
            options.listen,
            options.tls,
            options.unix_socket,
            options.allowed_users,
            reflection=options.reflection,
            kserve=options.kserve,
            stall_s=options.stall_s,
            update_locks=options.update_locks,
        )
        self._server = InferenceServer(router, server)
        self._observers = Observers(options.observing)
        models: ModelOpener | None = None
        if engines is None and options.engines.options.backend == "edgellm":
            engines = models = _edge_engines(options.engines, cancelled or never)
        engines = engines or CachedEngines(options.engines, cancelled or never)
        self.host = LocalHost(
            engines, router, options.host, observers=self._observers, models=models
        )
        self._openai = _openai_server(router, options)
        self.openai_address: Address | None = None  # while it listens
        self._metrics: MetricsServer | None = None

    def start(self) -> Address:
        """Listens; calls are told to come back until the host has a model. Raises Refused when an
        address is taken."""
        if self._options.metrics_listen is not None:
            self._metrics = self._serve_metrics(self._options.metrics_listen)
        try:
            if self._openai is not None:
                self.openai_address = self._openai.start()
            return self._server.start()
        except BaseException:
            self._end_openai()
            self._end_metrics()
            raise

    @property
    def metrics_port(self) -> int | None:
        """Of /metrics; None where it is off."""
        return None if self._metrics is None else self._metrics.port

    def stop(self, drain_s: float) -> None:
        """Admits nothing more, lets running requests end for `drain_s`, then frees everything."""
        self.host.drain(drain_s)
        self._end_openai()
        self._server.stop()
        self._end_metrics()
        self._observers.close()
        log.info("serving.stopped")

    def _serve_metrics(self, listen: TcpAddress) -> MetricsServer:
        if not listen.local:
            raise Refused(
                f"metrics on {listen.target()}: they carry no login and stay on loopback; "
                "scrape them through a proxy that adds TLS"
            )
        return MetricsServer(listen.host, listen.port, self._readings, self.host.histograms)

    def _readings(self) -> list[Reading]:
        return serving_readings(self.host.metrics())

    def _end_openai(self) -> None:
        if self._openai is not None:
            self._openai.stop()
            self._openai = self.openai_address = None

    def _end_metrics(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None


def _edge_engines(settings: EngineSettings, cancelled: Callable[[], bool]) -> EdgeEngines:
    """Raises Unsupported without the wheel, Refused for a context: the engine has its own."""
    from remora_agent.edgellm.source import EdgeEngines

    if settings.options.context is not None:
        raise Refused("context: an engine of TensorRT Edge-LLM has its own; leave it out")
    return EdgeEngines(cancelled)


def _openai_server(router: Router[ServedModel], options: StackOptions) -> OpenAiServer | None:
    """Raises Unsupported when its libraries are missing."""
    if options.openai is None:
        return None
    try:
        from remora_agent.serving.openai.server import OpenAiServer
    except ImportError as e:
        raise Unsupported(
            f"the OpenAI-compatible surface needs {e.name}: pip install starlette uvicorn"
        ) from e
    return OpenAiServer(router, replace(options.openai, allowed_users=options.allowed_users))
