"""OpenTelemetry traces of requests: a span each, with its parts, sent over OTLP.

The optional extra `remora[otel]`; nothing here is imported without an endpoint. Attributes follow
OpenTelemetry's semantic conventions for generative AI. No text of prompts or answers is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from remora_agent.telemetry.records import RequestRecord
from remora_contract.errors import Refused, RequestInvalid

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

SERVICE = "remora-agent"
_QUEUED_SPANS = 2048  # more are dropped by the exporter's own queue
_FAREWELL_MS = 3000


class RequestTraces:
    """`observe` is a sink of request records. Spans are made when a request has ended, with the
    times it had, so that nothing is traced on the way of a token."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer(SERVICE)

    @classmethod
    def to_endpoint(cls, endpoint: str) -> RequestTraces:
        """Over OTLP/gRPC to `http[s]://HOST:PORT`. Raises RequestInvalid for another endpoint,
        Refused without the packages."""
        if not endpoint.startswith(("http://", "https://")):
            raise RequestInvalid(f"OTLP endpoint {endpoint[:200]!r}: give http[s]://HOST:PORT")
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as e:
            raise Refused(
                f"traces need OpenTelemetry ({e.name} is missing): pip install 'remora[otel]'"
            ) from e
        provider = TracerProvider(
            resource=Resource.create({"service.name": SERVICE}), shutdown_on_exit=False
        )
        exporter = OTLPSpanExporter(endpoint, insecure=endpoint.startswith("http://"))
        provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=_QUEUED_SPANS))
        return cls(provider)

    def observe(self, record: RequestRecord) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(
            {"traceparent": record.origin.trace_parent}
        )
        began_ns, ended_ns = _ns(record.began_unix_s), _ns(record.began_unix_s + record.total_s)
        span = self._tracer.start_span(
            f"generate {record.origin.model}",
            parent,
            trace.SpanKind.SERVER,
            dict(_attributes(record)),
            start_time=began_ns,
        )
        if record.error:
            span.set_status(trace.StatusCode.ERROR, record.error[:500])
        inside = trace.set_span_in_context(span)
        for name, begin_s, end_s in _phases(record):
            part = self._tracer.start_span(name, inside, start_time=began_ns + _ns(begin_s))
            part.end(began_ns + _ns(end_s))
        span.end(ended_ns)

    def close(self) -> None:
        """Sends what waits, for a moment at most."""
        self._provider.force_flush(_FAREWELL_MS)
        self._provider.shutdown()


def _attributes(record: RequestRecord) -> Iterator[tuple[str, Any]]:
    yield "gen_ai.operation.name", "text_completion"
    yield "gen_ai.provider.name", "remora"
    yield "gen_ai.request.model", record.origin.model
    yield "gen_ai.response.id", record.request_id
    yield "gen_ai.response.finish_reasons", (record.outcome,)
    yield "gen_ai.usage.input_tokens", record.usage.prompt_tokens
    yield "gen_ai.usage.output_tokens", record.usage.completion_tokens
    yield "remora.cached_tokens", record.usage.cached_tokens
    yield "remora.adapters", tuple(f"{a.name}@{a.digest}" for a in record.adapters)
    if record.origin.use_case:
        yield "remora.use_case", record.origin.use_case
    if record.caller:
        yield "remora.caller", record.caller
    if record.client:
        yield "remora.client", record.client


def _phases(record: RequestRecord) -> Iterator[tuple[str, float, float]]:
    """Name, begin and end in seconds from the request's begin."""
    times = record.timings
    if times is None:
        return
    read_s = times.queue_s + times.prefill_s
    yield "queue", 0.0, times.queue_s
    yield "prefill", times.queue_s, read_s
    yield "decode", read_s, read_s + times.decode_s


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
