"""What is told of a request that has ended: log line, histograms, traces."""

from __future__ import annotations

import json
import logging
import sys
import urllib.request
from concurrent import futures
from types import SimpleNamespace

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from remora_agent.client import Client
from remora_agent.runtime.api import (
    Accepted,
    AnsweringAdapter,
    Delta,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    Provenance,
    SamplingParams,
    Share,
    StoppingParams,
    Timings,
    Usage,
)
from remora_agent.serving.address import TcpAddress
from remora_agent.telemetry.histograms import ServingHistograms
from remora_agent.telemetry.observers import Observing
from remora_agent.telemetry.records import MAX_TEXT_CHARS, Origin, RequestRecords
from remora_agent.telemetry.request_log import RequestLog
from remora_agent.telemetry.traces import RequestTraces
from remora_contract.errors import EngineFault, Refused, RequestInvalid
from tests.support.serving import ReferenceEngines, World, running_stack

ADAPTER = AnsweringAdapter("tone", "r1", "sha256:" + "a" * 64, 0.5)
PROVENANCE = Provenance("b", "e", (ADAPTER,))
REQUEST = GenerationRequest(
    "q1", (1, 2, 3), (), SamplingParams(), StoppingParams(8), share=Share(client="kiosk")
)
FINISHED = Finished(
    FinishReason.STOP, Usage(3, 1, 2), Timings(0.5, 0.25, 1.0, 0.75), PROVENANCE, "END"
)
PROMPT = "top secret"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def recorded(*events, origin=None):
    """The events a second apart; the records, the gaps, and what the listener heard."""
    clock, records, gaps, heard = Clock(), [], [], []
    watch = RequestRecords([records.append], gaps.append, clock=clock, wall_clock=lambda: 5000.0)
    listen = watch.listening(REQUEST, origin or Origin("m"), heard.append)
    for event in events:
        clock.now += 1
        listen(event)
    return SimpleNamespace(records=records, gaps=gaps, heard=heard)


def test_a_finished_request_leaves_one_record_of_all_that_it_was():
    events = [Accepted("q1", PROVENANCE), Delta("a", (7,)), Delta("b", (8,)), FINISHED]
    got = recorded(*events, origin=Origin("m", "both", "00-x"))
    assert got.heard == events
    (record,) = got.records
    assert (record.request_id, record.client, record.outcome) == ("q1", "kiosk", "stop")
    assert (record.origin.use_case, record.adapters) == ("both", (ADAPTER,))
    assert (record.began_unix_s, record.total_s) == (5000.0, 4.0)
    assert (record.usage, record.stop_match, record.answer_text) == (FINISHED.usage, "END", None)


def test_the_gap_is_the_time_of_one_token_also_when_several_come_together():
    got = recorded(Delta("a", (7,)), Delta("bc", (8, 9)), FINISHED)
    assert got.gaps == [0.5]


def test_a_failed_request_is_recorded_with_its_error_and_the_tokens_heard():
    got = recorded(Accepted("q1", PROVENANCE), Delta("a", (7,)), Failed(EngineFault("no memory")))
    (record,) = got.records
    assert (record.outcome, record.error) == (EngineFault.code, "no memory")
    assert (record.usage.completion_tokens, record.timings) == (1, None)


def test_no_text_is_kept_unless_asked_for_and_then_it_is_bounded():
    long = "x" * (MAX_TEXT_CHARS + 5)
    assert recorded(Delta("secret", (7,)), FINISHED).records[0].answer_text is None
    asked = Origin("m", prompt_text="p")
    got = recorded(Delta(long, (7,)), Delta("y", (8,)), FINISHED, origin=asked)
    assert got.records[0].answer_text == long[:MAX_TEXT_CHARS]


def test_histograms_count_every_request_and_every_gap_once():
    histograms = ServingHistograms()
    for record in recorded(Delta("a", (7,)), FINISHED).records:
        histograms.observe(record)
    histograms.gap(0.02)
    histograms.gap(1e9)
    found = {r.name: r for r in histograms.readings()}
    assert found["time_to_first_token_seconds"].total == 0.75
    assert sum(found["queue_seconds"].counts) == 1
    gaps = found["inter_token_seconds"].cumulative()
    assert dict(gaps)["0.02"] == 1
    assert gaps[-1] == ("+Inf", 2.0)


@pytest.fixture
def serve(tmp_path):
    """One request answered on a stack that observes so; its metrics page then."""

    def ask(**observing):
        world = World(tmp_path)
        metrics = TcpAddress("127.0.0.1", 0)
        options = {"observing": Observing(**observing), "metrics_listen": metrics}
        with running_stack(tmp_path, ReferenceEngines(), **options) as (stack, address):
            stack.host.switch(world.assignment(adapters=[("a", "r1")]))
            with Client(address, timeout_s=30) as client:
                client.generate(PROMPT, adapter="a", max_tokens=3, ignore_eos=True)
            with urllib.request.urlopen(f"http://127.0.0.1:{stack.metrics_port}/metrics") as page:
                return page.read().decode()

    return ask


def test_the_metrics_page_has_the_histograms_of_what_was_served(serve):
    page = serve()
    assert 'remora_time_to_first_token_seconds_bucket{le="+Inf"} 1.0' in page
    assert "remora_answer_tokens_sum 3.0" in page
    assert f"remora_prompt_tokens_sum {float(len(PROMPT))}" in page


@pytest.mark.parametrize(("kind", "shown"), [("summary", False), ("text", True)])
def test_the_request_log_has_texts_only_when_asked_for(serve, caplog, kind, shown):
    with caplog.at_level(logging.INFO, "remora.requests"):
        serve(request_log=RequestLog(kind))
    (line,) = [r for r in caplog.records if r.message == "request.ended"]
    assert line.adapters[0]["name"] == "a"
    assert (line.prompt_tokens, line.completion_tokens) == (len(PROMPT), 3)
    assert line.outcome == "length"
    assert (PROMPT in json.dumps(vars(line), default=str)) is shown


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans = []

    def Export(self, request, context):
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()


def test_a_request_is_a_span_with_its_phases_sent_to_a_collector(serve):
    collector, server = Collector(), grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        serve(otlp_endpoint=f"http://127.0.0.1:{port}")
    finally:
        server.stop(None)
    spans = {span.name: span for span in collector.spans}
    assert set(spans) == {"generate base", "queue", "prefill", "decode"}
    root = spans.pop("generate base")
    assert all(span.parent_span_id == root.span_id for span in spans.values())
    told = {a.key: a.value for a in root.attributes}
    assert told["gen_ai.usage.output_tokens"].int_value == 3
    assert PROMPT not in str(root)
    assert root.start_time_unix_nano <= spans["queue"].start_time_unix_nano


def test_traces_without_their_packages_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(Refused, match=r"remora\[otel\]"):
        RequestTraces.to_endpoint("http://127.0.0.1:1")


def test_an_endpoint_that_is_no_url_is_refused():
    with pytest.raises(RequestInvalid, match="http"):
        RequestTraces.to_endpoint("collector:4317")
