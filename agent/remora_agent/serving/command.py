"""The command `remora-agent serve`."""

from __future__ import annotations

import faulthandler
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from remora_agent.serving import flags
from remora_agent.serving.address import DEFAULT_LISTEN, parse_socket
from remora_agent.telemetry.request_log import RequestLog
from remora_contract.errors import RequestInvalid

if TYPE_CHECKING:
    from remora_agent.engine.opening import EngineOptions
    from remora_agent.runtime.options import RuntimeOptions
    from remora_agent.serving.openai.settings import OpenAiOptions
    from remora_agent.serving.stack import StackOptions
    from remora_agent.serving.tls import ServerTls
    from remora_agent.text.tools import ToolFormat


def register(app: typer.Typer) -> None:
    app.command("serve")(serve)


def serve(
    bundle: flags.Bundle,
    adapter: flags.Adapter = None,
    use_case: flags.UseCase = None,
    use_cases: flags.UseCases = None,
    listen: flags.Listen = DEFAULT_LISTEN,
    tls_cert: flags.TlsCert = None,
    tls_key: flags.TlsKey = None,
    tls_client_ca: flags.TlsClientCa = None,
    rows: flags.Rows = 8,
    context: flags.Context = None,
    threads: flags.Threads = None,
    prefill: flags.Prefill = "auto",
    backend: flags.Backend = "onnxruntime",
    overlap: flags.Overlap = "auto",
    draft_tokens: flags.DraftTokens = 8,
    exact_drafts: flags.ExactDrafts = False,
    cache_dir: flags.CacheDir = None,
    metrics_listen: flags.MetricsListen = None,
    unix_socket: flags.UnixSocket = None,
    allow_user: flags.AllowUser = None,
    request_log: flags.RequestLog = RequestLog.OFF,
    otlp_endpoint: flags.OtlpEndpoint = None,
    reflection: flags.Reflection = True,
    openai_listen: flags.OpenaiListen = None,
    openai_api_key_file: flags.OpenaiApiKeyFile = None,
    openai_adapter_dir: flags.OpenaiAdapterDir = None,
    tool_format: flags.ToolFormat = None,
    drain_s: flags.DrainS = 20.0,
    max_waiting: flags.MaxWaiting = 256,
    inter_token_s: flags.InterTokenS = 0.25,
    prefix_cache_mib: flags.PrefixCacheMib = 256,
    memory_floor_mib: flags.MemoryFloorMib = 256,
    kserve: flags.Kserve = True,
    log_level: flags.LogLevel = "warning",
) -> None:
    """Serves a bundle over gRPC until it is stopped. Needs no controller."""
    from remora_agent.engine.backends import check_backend, check_overlap
    from remora_agent.engine.opening import EngineOptions
    from remora_agent.engine.prefill import check_choice
    from remora_agent.runtime.options import RuntimeOptions
    from remora_agent.serving import standalone
    from remora_agent.serving.unix_gate import user_ids
    from remora_agent.telemetry.observers import Observing
    from remora_contract import structured_logs

    adapters = standalone.parse_adapters(adapter or [])
    compositions = [standalone.parse_use_case(text) for text in use_case or []]
    assignment = standalone.local_assignment(bundle, adapters, compositions, use_cases)
    stack = _stack_options(
        listen,
        _tls(tls_cert, tls_key, tls_client_ca),
        EngineOptions(
            rows=rows,
            context=context,
            threads=threads,
            prefill=check_choice(prefill),
            backend=check_backend(backend),
            overlap=check_overlap(overlap),
        ),
        cache_dir,
        metrics_listen,
        RuntimeOptions(
            max_waiting=max_waiting,
            inter_token_s=inter_token_s,
            prefix_bytes=prefix_cache_mib << 20,
            draft_tokens=draft_tokens,
            exact_drafts=exact_drafts,
            memory_floor_bytes=memory_floor_mib << 20,
        ),
    )
    observing = Observing(request_log, otlp_endpoint)
    stack = replace(
        stack,
        observing=observing,
        reflection=reflection,
        kserve=kserve,
        unix_socket=None if unix_socket is None else parse_socket(unix_socket),
        allowed_users=user_ids(allow_user) if allow_user else None,
        host=replace(stack.host, tool_format=_tool_format(tool_format)),
        openai=_openai(openai_listen, stack.tls, openai_api_key_file, openai_adapter_dir),
    )
    structured_logs.set_up(log_level)
    # A watchdog's SIGABRT then leaves every thread's stack in the journal.
    faulthandler.enable()
    standalone.run(assignment, standalone.StandaloneOptions(stack, drain_s), typer.echo)


def _tls(certificate: Path | None, key: Path | None, client_ca: Path | None) -> ServerTls | None:
    """Raises RequestInvalid for half of a pair."""
    from remora_agent.serving.tls import ServerTls

    if certificate is not None and key is not None:
        return ServerTls(certificate, key, client_ca)
    if certificate is not None or key is not None or client_ca is not None:
        raise RequestInvalid("give --tls-cert and --tls-key together; --tls-client-ca needs both")
    return None


def _stack_options(
    listen: str,
    tls: ServerTls | None,
    engine: EngineOptions,
    cache_dir: Path | None,
    metrics_listen: str | None,
    runtime: RuntimeOptions,
) -> StackOptions:
    from remora_agent.hosting.engines import EngineSettings, default_cache
    from remora_agent.local_host import HostSettings
    from remora_agent.serving.address import TcpAddress, parse_address
    from remora_agent.serving.stack import StackOptions

    metrics = parse_address(metrics_listen) if metrics_listen else None
    if metrics is not None and not isinstance(metrics, TcpAddress):
        raise RequestInvalid("--metrics-listen: give HOST:PORT")
    return StackOptions(
        listen=parse_address(listen),
        tls=tls,
        engines=EngineSettings(
            cache_dir=cache_dir or default_cache(),
            memory_floor_bytes=runtime.memory_floor_bytes,
            options=engine,
        ),
        host=HostSettings(runtime),
        metrics_listen=metrics,
    )


def _openai(
    listen: str | None,
    tls: ServerTls | None,
    key_file: Path | None,
    adapter_dir: Path | None,
) -> OpenAiOptions | None:
    from remora_agent.serving.openai.settings import openai_options

    if listen is None and (key_file is not None or adapter_dir is not None):
        raise RequestInvalid("--openai-api-key-file and --openai-adapter-dir need --openai-listen")
    if adapter_dir is not None and not adapter_dir.is_dir():
        raise RequestInvalid(f"--openai-adapter-dir {adapter_dir} is no directory; make it first")
    return openai_options(listen, tls, key_file, adapter_dir)


def _tool_format(name: str | None) -> ToolFormat | None:
    from remora_agent.text.tools import FORMATS

    if name is not None and name not in FORMATS:
        raise RequestInvalid(f"--tool-format {name[:40]!r} is not one of {', '.join(FORMATS)}")
    return FORMATS[name] if name is not None else None
