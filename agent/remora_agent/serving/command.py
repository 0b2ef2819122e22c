"""The command `remora-agent serve`."""

from __future__ import annotations

import faulthandler
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remora_agent.engine.prefill import CHOICES, PREFILL_HELP
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
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="Directory made by `remora-build export`.")
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="A converted adapter and its name. Repeatable."),
    ] = None,
    use_case: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=A:0.7,B:0.3", help="A named, weighted mix of adapters. Repeatable."
        ),
    ] = None,
    use_cases: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Directory made by `remora-build use-cases convert`: all its adapters and use "
            "cases.",
        ),
    ] = None,
    listen: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="Address of the gRPC server, or unix:/path. Off loopback it needs TLS.",
        ),
    ] = DEFAULT_LISTEN,
    tls_cert: Annotated[
        Path | None, typer.Option(help="PEM file with the server's certificate chain.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="PEM file with that certificate's key.")
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(help="PEM file with a CA; only clients with its certificates may call."),
    ] = None,
    rows: Annotated[int, typer.Option(help="Requests decoded together.")] = 8,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens a request may hold (default: the bundle's capacity)."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="Compute threads (default: one for each physical core)."),
    ] = None,
    prefill: Annotated[
        str,
        typer.Option(metavar="FORM", help=PREFILL_HELP, autocompletion=lambda: list(CHOICES)),
    ] = "auto",
    draft_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            max=16,
            help="Tokens guessed from the text and proven in one step while one request decodes "
            "alone; 0: none.",
        ),
    ] = 8,
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Directory of built engines (default: ~/.cache/remora/engines)."),
    ] = None,
    metrics_listen: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Serve Prometheus /metrics here (loopback only)."),
    ] = None,
    unix_socket: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Listen on this unix socket too (mode 0660)."),
    ] = None,
    allow_user: Annotated[
        list[str] | None,
        typer.Option(
            metavar="USER",
            help="Name or number of a user who may call over unix sockets (default: all whom the "
            "socket's mode lets in). Repeatable.",
        ),
    ] = None,
    request_log: Annotated[
        RequestLog,
        typer.Option(
            help="A log line for each request that has ended: off, summary (counts, times, "
            "digests) or text (the prompt and the answer too)."
        ),
    ] = RequestLog.OFF,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="http://HOST:PORT",
            help="Send a trace of each request there over OTLP/gRPC (needs remora[otel]).",
        ),
    ] = None,
    reflection: Annotated[
        bool, typer.Option(help="Describe the services to gRPC clients that ask.")
    ] = True,
    openai_listen: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Serve the OpenAI-compatible HTTP surface here too, or on unix:/path. Off "
            "loopback it needs TLS and API keys.",
        ),
    ] = None,
    openai_api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="An API key on each line; the variable REMORA_OPENAI_API_KEY adds one.",
        ),
    ] = None,
    openai_adapter_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Let callers load and unload the converted adapters below this directory.",
        ),
    ] = None,
    tool_format: Annotated[
        str | None,
        typer.Option(
            help="How the model writes calls of tools: hermes, llama, mistral, mistral-args, "
            "granite or phi (default: what its chat template says)."
        ),
    ] = None,
    drain_s: Annotated[
        float, typer.Option(min=0.0, help="Seconds that running requests get to end at shutdown.")
    ] = 20.0,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Requests that wait; more are told when to come back.")
    ] = 256,
    inter_token_s: Annotated[
        float,
        typer.Option(min=0.001, help="Running answers move this often while prompts are read."),
    ] = 0.25,
    prefix_cache_mib: Annotated[
        int,
        typer.Option(min=0, help="Memory for prompts that begin alike (0: none is reused)."),
    ] = 256,
    memory_floor_mib: Annotated[
        int, typer.Option(min=0, help="Memory that stays free (0: not looked at).")
    ] = 256,
    kserve: Annotated[
        bool, typer.Option(help="Answer KServe v2 clients, Triton's for one, on the same address.")
    ] = True,
    log_level: Annotated[
        str, typer.Option(help="Of the JSON logs on stderr: debug, info, warning or error.")
    ] = "warning",
) -> None:
    """Serves a bundle over gRPC until it is stopped. Needs no controller."""
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
        ),
        cache_dir,
        metrics_listen,
        RuntimeOptions(
            max_waiting=max_waiting,
            inter_token_s=inter_token_s,
            prefix_bytes=prefix_cache_mib << 20,
            draft_tokens=draft_tokens,
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
