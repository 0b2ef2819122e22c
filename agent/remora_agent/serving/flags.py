"""The options of `remora-agent serve` and what their help says. Knows no values but types."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from remora_agent.engine.backends import BACKEND_HELP, BACKENDS, OVERLAP_HELP, OVERLAPS
from remora_agent.engine.prefill import CHOICES, PREFILL_HELP
from remora_agent.runtime.options import EXACT_DRAFTS_HELP
from remora_agent.telemetry import request_log
from remora_agent.text.tools import FORMATS

Bundle = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Directory made by `remora-build export`.")
]
Adapter = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=DIR", help="A converted adapter and its name. Repeatable."),
]
UseCase = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=A:0.7,B:0.3", help="A named, weighted mix of adapters. Repeatable."),
]
UseCases = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Directory made by `remora-build use-cases convert`: all its adapters and use cases.",
    ),
]
Listen = Annotated[
    str,
    typer.Option(
        metavar="HOST:PORT",
        help="Address of the gRPC server, or unix:/path. Off loopback it needs TLS.",
    ),
]
TlsCert = Annotated[Path | None, typer.Option(help="PEM file with the server's certificate chain.")]
TlsKey = Annotated[Path | None, typer.Option(help="PEM file with that certificate's key.")]
TlsClientCa = Annotated[
    Path | None,
    typer.Option(help="PEM file with a CA; only clients with its certificates may call."),
]
Rows = Annotated[int, typer.Option(help="Requests decoded together.")]
Context = Annotated[
    int | None,
    typer.Option(help="Tokens a request may hold (default: the bundle's capacity)."),
]
Threads = Annotated[
    int | None,
    typer.Option(help="Compute threads (default: one for each physical core)."),
]
Prefill = Annotated[
    str, typer.Option(metavar="FORM", help=PREFILL_HELP, autocompletion=lambda: list(CHOICES))
]
Backend = Annotated[
    str, typer.Option(metavar="NAME", help=BACKEND_HELP, autocompletion=lambda: list(BACKENDS))
]
Overlap = Annotated[
    str, typer.Option(metavar="CHOICE", help=OVERLAP_HELP, autocompletion=lambda: list(OVERLAPS))
]
DraftTokens = Annotated[
    int,
    typer.Option(
        min=0,
        max=16,
        help="Tokens guessed from the text and proven in one step while one request decodes "
        "alone; 0: none.",
    ),
]
ExactDrafts = Annotated[bool, typer.Option("--exact-drafts", help=EXACT_DRAFTS_HELP)]
CacheDir = Annotated[
    Path | None,
    typer.Option(help="Directory of built engines (default: ~/.cache/remora/engines)."),
]
MetricsListen = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Serve Prometheus /metrics here (loopback only)."),
]
UnixSocket = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="Listen on this unix socket too (mode 0660)."),
]
AllowUser = Annotated[
    list[str] | None,
    typer.Option(
        metavar="USER",
        help="Name or number of a user who may call over unix sockets (default: all whom the "
        "socket's mode lets in). Repeatable.",
    ),
]
RequestLog = Annotated[
    request_log.RequestLog,
    typer.Option(
        help="A log line for each request that has ended: off, summary (counts, times, "
        "digests) or text (the prompt and the answer too)."
    ),
]
OtlpEndpoint = Annotated[
    str | None,
    typer.Option(
        metavar="http://HOST:PORT",
        help="Send a trace of each request there over OTLP/gRPC (needs remora\\[otel]).",
    ),
]
Reflection = Annotated[bool, typer.Option(help="Describe the services to gRPC clients that ask.")]
OpenaiListen = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Serve the OpenAI-compatible HTTP surface here too, or on unix:/path. Off "
        "loopback it needs TLS and API keys.",
    ),
]
OpenaiApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="An API key on each line; the variable REMORA_OPENAI_API_KEY adds one.",
    ),
]
OpenaiAdapterDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Let callers load and unload the converted adapters below this directory.",
    ),
]
ToolFormat = Annotated[
    str | None,
    typer.Option(
        metavar="FORMAT",
        help=f"How the model writes calls of tools: {', '.join(FORMATS)} (default: what its chat "
        "template says).",
        autocompletion=lambda: list(FORMATS),
    ),
]
DrainS = Annotated[
    float, typer.Option(min=0.0, help="Seconds that running requests get to end at shutdown.")
]
MaxWaiting = Annotated[
    int, typer.Option(min=1, help="Requests that wait; more are told when to come back.")
]
InterTokenS = Annotated[
    float,
    typer.Option(min=0.001, help="Running answers move this often while prompts are read."),
]
PrefixCacheMib = Annotated[
    int,
    typer.Option(min=0, help="Memory for prompts that begin alike (0: none is reused)."),
]
MemoryFloorMib = Annotated[
    int, typer.Option(min=0, help="Memory that stays free (0: not looked at).")
]
Kserve = Annotated[
    bool, typer.Option(help="Answer KServe v2 clients, Triton's for one, on the same address.")
]
LogLevel = Annotated[
    str, typer.Option(help="Of the JSON logs on stderr: debug, info, warning or error.")
]
