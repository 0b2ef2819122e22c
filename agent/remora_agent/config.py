"""agent.toml, parsed once into frozen values. Strict: unknown keys are errors naming key and file.

Owns the file's shape and defaults (docs/agent.md is checked against the `help` texts here). Knows
nothing of what the values are used for.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remora_agent.engine.backends import BACKEND_HELP, BACKENDS, OVERLAP_HELP, OVERLAPS
from remora_agent.engine.prefill import CHOICES, PREFILL_HELP
from remora_agent.runtime.options import EXACT_DRAFTS_HELP, MAX_DRAFT_TOKENS
from remora_agent.serving.address import TcpAddress, parse_address
from remora_agent.text.tools import FORMATS
from remora_contract.errors import DocumentInvalid, RequestInvalid
from remora_contract.strict import parse
from remora_contract.windows import parse_windows, windows_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MAX_CONFIG_BYTES = 1 << 20
_REQUEST_LOGS = ("off", "summary", "text")


def _setting(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


def _required(help_text: str) -> Any:
    return field(metadata={"help": help_text})


@dataclass(frozen=True)
class ControllerConfig:
    address: str | None = _setting(
        None, "HOST:PORT of the controller's fleet port; when absent, the one stored by `join`."
    )

    enrolment_address: str | None = _setting(
        None,
        "HOST:PORT of its enrolment port, for the renewal of an expired certificate; when absent, "
        "the one that `join` used.",
    )

    def __post_init__(self) -> None:
        if self.address is not None:
            check_address(self.address, "controller.address")
        if self.enrolment_address is not None:
            check_address(self.enrolment_address, "controller.enrolment_address")


@dataclass(frozen=True)
class ServingConfig:
    listen: str = _setting(
        "127.0.0.1:7450", "HOST:PORT or unix:/path of the gRPC inference surface."
    )
    tls_certificate: str | None = _setting(
        None, "PEM file with the inference server's certificate; required off loopback."
    )
    tls_key: str | None = _setting(None, "PEM file with that certificate's key.")
    tls_client_ca: str | None = _setting(
        None, "PEM file with the CA whose clients may call; required off loopback."
    )
    rows: int = _setting(8, "Sequences decoded together.")
    context: int | None = _setting(
        None, "Tokens a sequence may hold; absent: the bundle's capacity."
    )
    threads: int | None = _setting(None, "Compute threads; absent: one for each physical core.")
    prefill: str = _setting("auto", PREFILL_HELP)
    backend: str = _setting("onnxruntime", BACKEND_HELP)
    overlap: str = _setting("auto", OVERLAP_HELP)
    drain_s: float = _setting(20.0, "Seconds running requests get to end at shutdown.")
    draft_tokens: int = _setting(
        8,
        "Tokens guessed from the text and proven in one step while one request decodes alone, at "
        "most 16; 0: none.",
    )
    exact_drafts: bool = _setting(False, EXACT_DRAFTS_HELP)
    max_waiting: int = _setting(256, "Requests that wait for a row; more are told to come back.")
    inter_token_s: float = _setting(
        0.25, "Long prompts are read in pieces so short that running answers move this often."
    )
    prefix_cache_bytes: int = _setting(
        256 << 20, "Memory for the keys and values of prompts that begin alike; 0: none is reused."
    )
    memory_floor_bytes: int = _setting(
        256 << 20,
        "Bytes of memory that stay free; requests and engines that need them are refused.",
    )
    unix_socket: str | None = _setting(
        None, "Path of a unix socket to serve on too (mode 0660); absent: none."
    )
    allowed_users: tuple[str, ...] = _setting(
        (),
        "Names or numbers of users who may call over unix sockets; empty: all whom the socket's "
        "mode lets in.",
    )
    reflection: bool = _setting(True, "Describe the services to gRPC clients that ask.")
    kserve: bool = _setting(
        True, "Answer KServe v2 clients (inference.GRPCInferenceService) on the same address."
    )
    tool_format: str | None = _setting(
        None,
        "How the model writes calls of tools: hermes, llama, mistral, mistral-args, granite, "
        "phi, qwen3-coder or pythonic; absent: what its chat template says.",
    )

    def __post_init__(self) -> None:
        _check_listen(self.listen, "serving.listen")
        if self.unix_socket is not None:
            _check_listen(f"unix:{self.unix_socket}", "serving.unix_socket")
        _at_least(self.rows, 1, "serving.rows")
        _at_least(self.context, 2, "serving.context")
        _at_least(self.threads, 1, "serving.threads")
        _at_least(self.drain_s, 0, "serving.drain_s")
        if self.prefill not in CHOICES:
            raise ValueError(f"serving.prefill must be one of {', '.join(CHOICES)}")
        if self.overlap not in OVERLAPS:
            raise ValueError(f"serving.overlap must be one of {', '.join(OVERLAPS)}")
        if self.backend not in BACKENDS:
            raise ValueError(f"serving.backend must be one of {', '.join(BACKENDS)}")
        _at_least(self.draft_tokens, 0, "serving.draft_tokens")
        if self.draft_tokens > MAX_DRAFT_TOKENS:
            raise ValueError(f"serving.draft_tokens must be at most {MAX_DRAFT_TOKENS}")
        _at_least(self.max_waiting, 1, "serving.max_waiting")
        _at_least(self.inter_token_s, 0.001, "serving.inter_token_s")
        _at_least(self.prefix_cache_bytes, 0, "serving.prefix_cache_bytes")
        _at_least(self.memory_floor_bytes, 0, "serving.memory_floor_bytes")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together: give both or neither")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("serving.tls_client_ca needs tls_certificate and tls_key")
        if self.tool_format is not None and self.tool_format not in FORMATS:
            known = ", ".join(sorted(FORMATS))
            raise ValueError(f"tool_format {self.tool_format!r} is not one of {known}")


@dataclass(frozen=True)
class OpenAiConfig:
    listen: str | None = _setting(
        None,
        "HOST:PORT or unix:/path of the OpenAI-compatible HTTP surface; absent: off. Off loopback "
        "it needs API keys, and serving.tls_certificate and tls_key.",
    )
    api_key_file: str | None = _setting(
        None,
        "File with an API key on each line, for the agent's user alone; the variable "
        "REMORA_OPENAI_API_KEY adds one.",
    )
    adapter_directory: str | None = _setting(
        None,
        "Directory of converted adapters that callers may load and unload over HTTP; absent: they "
        "may not.",
    )

    def __post_init__(self) -> None:
        if self.listen is not None:
            _check_listen(self.listen, "openai.listen")
        for name in ("api_key_file", "adapter_directory"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_absolute():
                raise ValueError(f"openai.{name} {path!r} must be an absolute path")
            if path is not None and self.listen is None:
                raise ValueError(f"openai.{name} goes with openai.listen: give both or neither")


@dataclass(frozen=True)
class AdaptersConfig:
    host_bytes: int = _setting(
        1 << 30, "Bytes of adapters kept in host memory, counted as float32."
    )
    bank_bytes: int | None = _setting(
        2 << 30,
        "Bytes of all adapters resident in the engine, counted as float32. Those that fit no more "
        "leave the least recently used.",
    )
    bank_rank: int | None = _setting(
        None, "Sum of the ranks of resident adapters; absent: the bundle's --max-bank-rank."
    )
    turn_s: float = _setting(
        2.0,
        "Seconds a request waits for room for its adapters before others give way, and an adapter "
        "that requests want keeps its place.",
    )

    def __post_init__(self) -> None:
        _at_least(self.host_bytes, 1, "adapters.host_bytes")
        _at_least(self.bank_bytes, 1, "adapters.bank_bytes")
        _at_least(self.bank_rank, 1, "adapters.bank_rank")
        _at_least(self.turn_s, 0.01, "adapters.turn_s")


@dataclass(frozen=True)
class TelemetryConfig:
    interval_s: float = _setting(10.0, "Seconds between samples.")
    metrics_listen: str | None = _setting(
        "127.0.0.1:7452",
        'HOST:PORT of Prometheus /metrics (plain HTTP, loopback); "" turns it off.',
    )
    request_log: str = _setting(
        "summary",
        "A log line for each ended request: off, summary (counts, times, digests) or text (the "
        "prompt and the answer too).",
    )
    otlp_endpoint: str | None = _setting(
        None,
        "http[s]://HOST:PORT that gets a trace of each request over OTLP/gRPC (remora[otel]); "
        "absent: no traces.",
    )
    kept_log_bytes: int = _setting(
        4 << 20,
        "Bytes of its own log that the agent keeps in its state directory for `remora logs fetch`, "
        "without prompts and answers; 0 keeps none.",
    )
    spool_events: int = _setting(5000, "Events kept while offline; the oldest are dropped first.")
    spool_samples: int = _setting(
        50_000, "Metric samples kept while offline; the oldest are dropped first."
    )

    def __post_init__(self) -> None:
        _at_least(self.interval_s, 0.1, "telemetry.interval_s")
        _at_least(self.kept_log_bytes, 0, "telemetry.kept_log_bytes")
        _at_least(self.spool_events, 10, "telemetry.spool_events")
        _at_least(self.spool_samples, 10, "telemetry.spool_samples")
        if self.request_log not in _REQUEST_LOGS:
            raise ValueError(f"request_log is one of {', '.join(_REQUEST_LOGS)}")
        if self.otlp_endpoint and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ValueError(f"otlp_endpoint must be http[s]://HOST:PORT, not {self.otlp_endpoint}")
        if self.metrics_listen:
            host, _ = check_address(self.metrics_listen, "telemetry.metrics_listen")
            if not is_loopback(host):
                raise ValueError(
                    f"metrics_listen {self.metrics_listen!r} is plain HTTP: use a loopback address"
                )


@dataclass(frozen=True)
class LimitsConfig:
    disk_floor_bytes: int = _setting(
        512 << 20, "Bytes that stay free on the state directory's disk whatever is shipped."
    )
    download_bytes_per_s: int | None = _setting(
        None, "Bandwidth cap of downloads, bytes per second; absent: no cap."
    )
    pinned_releases: tuple[str, ...] = _setting(
        (), "Release ids whose files are never removed from disk."
    )
    max_lock_s: float = _setting(
        3600.0,
        "Longest lock on updates that an application may take, and how long all locks together "
        "may hold one update up.",
    )

    def __post_init__(self) -> None:
        _at_least(self.disk_floor_bytes, 0, "limits.disk_floor_bytes")
        _at_least(self.download_bytes_per_s, 1024, "limits.download_bytes_per_s")
        _at_least(self.max_lock_s, 0, "limits.max_lock_s")


@dataclass(frozen=True)
class AgentConfig:
    state_dir: str = _required("Directory that holds identity, artifacts, engines and state.db.")
    labels: dict[str, str] = field(
        default_factory=dict,
        metadata={"help": "Labels the device reports; rollouts select devices by them."},
    )
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    openai: OpenAiConfig = field(default_factory=OpenAiConfig)
    adapters: AdaptersConfig = field(default_factory=AdaptersConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)

    def __post_init__(self) -> None:
        if not Path(self.state_dir).is_absolute():
            raise ValueError(f"state_dir {self.state_dir!r} must be an absolute path")
        parse_windows(windows_of(self.labels))
        listening = (self.serving.listen, self.openai.listen or "")
        on_socket = self.serving.unix_socket or any(a.startswith("unix:") for a in listening)
        if self.serving.allowed_users and not on_socket:
            raise ValueError(
                "serving.allowed_users is about unix sockets and none is configured: give "
                "serving.unix_socket or leave it out"
            )


def load_config(path: Path) -> AgentConfig:
    """Reads agent.toml. Raises DocumentInvalid naming the key and the file."""
    try:
        with path.open("rb") as f:
            data = f.read(_MAX_CONFIG_BYTES + 1)
    except OSError as e:
        raise DocumentInvalid(f"{path} cannot be read: {e.strerror or e}") from e
    if len(data) > _MAX_CONFIG_BYTES:
        raise DocumentInvalid(f"{path} is larger than {_MAX_CONFIG_BYTES} bytes: no agent.toml")
    try:
        document = tomllib.loads(data.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise DocumentInvalid(f"{path}: not valid TOML: {e}") from e
    return parse(AgentConfig, document, str(path))


def check_address(text: str, what: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port`, taken apart. Raises ValueError naming `what`."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{what} must be HOST:PORT, not {text[:80]!r}")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(f"{what}: put an IPv6 address in brackets, like [::1]:{port}")
    return host.strip("[]"), int(port)


def _check_listen(text: str, what: str) -> None:
    try:
        parse_address(text)
    except RequestInvalid as e:
        raise ValueError(f"{what}: {e}") from e


def is_loopback(host: str) -> bool:
    """A name that merely begins with 127. is none."""
    return TcpAddress(host, 0).local


def _at_least(value: float | None, least: float, what: str) -> None:
    if value is not None and value < least:
        raise ValueError(f"{what} must be at least {least}, not {value}")
