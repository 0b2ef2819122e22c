"""`remora-agent run`: the composition root of a device that follows a controller.

Builds host, inference server, control side and /metrics, runs them until told to stop, and speaks
with systemd. The only module of the control side that knows how serving is made.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from remora_agent.config import (
    AdaptersConfig,
    AgentConfig,
    OpenAiConfig,
    ServingConfig,
    check_address,
)
from remora_agent.control.agent import Agent, Supervisor
from remora_agent.control.compose import compose
from remora_agent.control.identity import load_identity
from remora_agent.control.kept_log import keeping_log, last_lines
from remora_agent.control.layout import StateLayout, exclusive
from remora_agent.host import ServingHost
from remora_agent.telemetry.prometheus import MetricsServer
from remora_agent.update_locks import LockBook
from remora_contract import systemd_notify
from remora_contract.errors import Refused

if TYPE_CHECKING:
    from remora_agent.engine.opening import EngineOptions
    from remora_agent.runtime.options import RuntimeOptions
    from remora_agent.serving.openai.settings import OpenAiOptions
    from remora_agent.serving.stack import StackOptions
    from remora_agent.serving.tls import ServerTls

log = logging.getLogger(__name__)
_TICK_S = 5.0
# What opens the serving half: a host to drive, closed on exit. The last argument is asked during
# engine builds: a stop must not wait for one.
OpenHost = Callable[
    [AgentConfig, StateLayout, Callable[[], bool]], AbstractContextManager[ServingHost]
]


@contextmanager
def local_host(
    config: AgentConfig, layout: StateLayout, cancelled: Callable[[], bool]
) -> Iterator[ServingHost]:
    """The real thing: engines, models and the gRPC surface of this process."""
    from remora_agent.serving.descriptors import raise_limit
    from remora_agent.serving.stack import ServingStack

    made = stack_options(config, layout)
    raise_limit()
    stack = ServingStack(made, cancelled)
    stack.start()
    try:
        yield stack.host
    finally:
        stack.stop(drain_s=0.0)  # the agent has drained, with the time that was configured


def stack_options(config: AgentConfig, layout: StateLayout) -> StackOptions:
    """What agent.toml says of the serving half. Raises RequestInvalid, DocumentInvalid, Refused
    for what no start could honour."""
    from remora_agent.hosting.engines import EngineSettings
    from remora_agent.local_host import HostSettings
    from remora_agent.serving.address import parse_address, parse_socket
    from remora_agent.serving.stack import StackOptions
    from remora_agent.serving.unix_gate import user_ids
    from remora_agent.telemetry.observers import Observing
    from remora_agent.telemetry.request_log import RequestLog
    from remora_agent.text.tools import FORMATS

    serving, telemetry, tls = config.serving, config.telemetry, _tls(config.serving)
    return StackOptions(
        parse_address(serving.listen),
        tls,
        EngineSettings(
            cache_dir=layout.engines,
            memory_floor_bytes=serving.memory_floor_bytes,
            options=_engine_options(serving),
        ),
        HostSettings(
            _runtime_options(serving, config.adapters),
            tool_format=FORMATS[serving.tool_format] if serving.tool_format else None,
        ),
        observing=Observing(RequestLog(telemetry.request_log), telemetry.otlp_endpoint),
        reflection=serving.reflection,
        kserve=serving.kserve,
        update_locks=LockBook(layout.update_locks, time.time, config.limits.max_lock_s),
        unix_socket=None if serving.unix_socket is None else parse_socket(serving.unix_socket),
        allowed_users=user_ids(serving.allowed_users) if serving.allowed_users else None,
        openai=_openai(config.openai, tls),
    )


def _engine_options(serving: ServingConfig) -> EngineOptions:
    from remora_agent.engine.backends import check_backend, check_overlap
    from remora_agent.engine.opening import EngineOptions
    from remora_agent.engine.prefill import check_choice

    return EngineOptions(
        rows=serving.rows,
        context=serving.context,
        threads=serving.threads,
        prefill=check_choice(serving.prefill),
        backend=check_backend(serving.backend),
        overlap=check_overlap(serving.overlap),
    )


def _runtime_options(serving: ServingConfig, adapters: AdaptersConfig) -> RuntimeOptions:
    from remora_agent.runtime.options import RuntimeOptions

    return RuntimeOptions(
        max_waiting=serving.max_waiting,
        inter_token_s=serving.inter_token_s,
        prefix_bytes=serving.prefix_cache_bytes,
        memory_floor_bytes=serving.memory_floor_bytes,
        patience_s=adapters.turn_s,
        host_bytes=adapters.host_bytes,
        bank_rank=adapters.bank_rank,
        bank_bytes=adapters.bank_bytes,
        draft_tokens=serving.draft_tokens,
        exact_drafts=serving.exact_drafts,
    )


def run_agent(
    config: AgentConfig,
    stop: threading.Event,
    open_host: OpenHost = local_host,
) -> None:
    """Until `stop` is set. Raises NotFound when the device has not joined, Refused when another
    agent holds the state directory or a port is taken."""
    layout = StateLayout(Path(config.state_dir))
    layout.create()
    stopping = threading.Event()
    with ExitStack() as stack:
        stack.enter_context(exclusive(layout))
        last_words = last_lines(layout.kept_log)  # of the run before this one
        stack.enter_context(keeping_log(layout.kept_log, config.telemetry.kept_log_bytes))
        identity = load_identity(layout.identity)
        host = stack.enter_context(open_host(config, layout, stopping.is_set))
        parts = compose(config, identity, host, last_words=last_words)
        if config.telemetry.metrics_listen:
            address = check_address(config.telemetry.metrics_listen, "metrics_listen")
            latest = parts.telemetry.sampler.latest
            stack.enter_context(MetricsServer(*address, latest, host.histograms))
        log.info(
            "agent.started",
            extra={"device_id": identity.device_id, "controller": parts.client.address},
        )
        Agent(parts, _supervisor(stopping), stop).run()


def _supervisor(stopping: threading.Event) -> Supervisor:
    def stop() -> None:
        _tell(systemd_notify.STOPPING)
        stopping.set()

    interval_s = systemd_notify.watchdog_interval_s() or _TICK_S
    return Supervisor(
        ready=lambda: _tell(systemd_notify.READY),
        alive=lambda: _tell(systemd_notify.WATCHDOG),
        stopping=stop,
        tick_s=min(_TICK_S, interval_s),
    )


def _tell(state: str) -> None:
    systemd_notify.notify(state)


def _tls(serving: ServingConfig) -> ServerTls | None:
    from remora_agent.serving.tls import ServerTls

    if serving.tls_certificate is None or serving.tls_key is None:
        return None
    client_ca = None if serving.tls_client_ca is None else Path(serving.tls_client_ca)
    return ServerTls(Path(serving.tls_certificate), Path(serving.tls_key), client_ca)


def _openai(config: OpenAiConfig, tls: ServerTls | None) -> OpenAiOptions | None:
    """Raises Refused for a directory that is not there."""
    from remora_agent.serving.openai.settings import openai_options

    folder = config.adapter_directory
    if folder is not None and not Path(folder).is_dir():
        raise Refused(f"openai.adapter_directory {folder} is no directory; make it or leave it out")
    return openai_options(config.listen, tls, config.api_key_file, config.adapter_directory)
