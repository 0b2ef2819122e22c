"""Callers over gRPC that stall, leave or do nothing: their requests end, nothing of them stays, and
everybody else goes on."""

from __future__ import annotations

import gc
import logging
import os
import socket
from contextlib import contextmanager

import grpc
import psutil
import pytest

from remora_agent.client import Client
from remora_agent.serving.address import UnixAddress
from remora_protos.inference.v1 import inference_pb2 as pb
from remora_protos.inference.v1 import inference_pb2_grpc as rpc
from remora_protos.kserve.v2 import grpc_service_pb2_grpc as kserve_rpc
from tests.agent.serving.company import LONG, kserve_request, nothing_left, slowly, wait_until
from tests.support.serving import ReferenceEngines, World, running_stack

STALL_S = 0.5
# Without probes of the bandwidth a connection's window stays at 64 KiB.
NARROW = [("grpc.http2.bdp_probe", 0)]
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"  # and empty settings


@pytest.fixture
def impatient(tmp_path):
    """A server that gives readers half a second, and answers too long for a connection's window."""
    world, engines = World(tmp_path, context=2048), ReferenceEngines()
    with running_stack(tmp_path, engines, stall_s=STALL_S) as (stack, address):
        stack.host.switch(world.assignment(adapters=[("a", "r1")]))
        yield stack, address


def own_stream(channel, request_id: str):
    request = pb.GenerateRequest(text="x", request_id=request_id, n=8)
    request.stopping.max_tokens, request.stopping.ignore_eos = 1900, True
    request.logprobs.top = 20
    return rpc.InferenceStub(channel).Generate(request)


def kserve_stream(channel, request_id: str):
    """Answers of single words in messages much longer than they, many at a time."""
    asked = [
        kserve_request("x", f"{request_id}-{i}", max_tokens=1900, ignore_eos=True, temperature=0.0)
        for i in range(64)
    ]
    # Requests stay open until the call ends.
    return kserve_rpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter(asked))


@pytest.mark.parametrize("ask", [own_stream, kserve_stream])
def test_a_stream_that_is_never_read_ends_and_others_go_on(impatient, ask, caplog):
    caplog.set_level(logging.INFO, "remora_agent.serving")
    stack, address = impatient
    with grpc.insecure_channel(address, NARROW) as channel, Client(address, timeout_s=60) as other:
        unread = ask(channel, "slow")
        while not any(r.message == "rpc.refused" for r in caplog.records):
            assert other.generate("quick", max_tokens=4, ignore_eos=True).usage.completion_tokens
        wait_until(lambda: nothing_left(stack), "its rows are free")
        # Nothing holds its id any more.
        again = other.generate("x", max_tokens=4, ignore_eos=True, request_id="slow")
        assert again.usage.completion_tokens == 4
        # Who reads on after all hears what was sent before, and why it ends.
        with pytest.raises(grpc.RpcError) as ended:
            list(unread)
    gc.collect()  # a task whose error nobody heard would say so now
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert f"nothing of the answer was read for {STALL_S} s" in ended.value.details()


@pytest.mark.slow
def test_a_reader_that_pauses_for_long_and_reads_on_misses_nothing(tmp_path):
    """What it has not read by then is much more than a message may hold."""
    world = World(tmp_path, context=24_000)
    with running_stack(tmp_path, ReferenceEngines()) as (stack, address):
        stack.host.switch(world.assignment())
        with grpc.insecure_channel(address, NARROW) as channel:
            request = pb.GenerateRequest(text="x")
            request.stopping.max_tokens, request.stopping.ignore_eos = 23_000, True
            request.logprobs.top = 20
            unread = rpc.InferenceStub(channel).Generate(request)
            wait_until(lambda: stack.host.metrics()["rows_busy"], "it runs")
            wait_until(lambda: nothing_left(stack), "it has ended")
            events = list(unread)
    assert sum(len(e.delta.logprobs) for e in events) == 23_000
    assert sum(e.ByteSize() for e in events) > 4 << 20


def before_it_runs(served, call) -> None:
    served.engines.gate.clear()


def at_once(served, call) -> None:
    """With nothing sent yet but the request."""


def in_the_middle(served, call) -> None:
    for _ in range(3):
        next(call)


def after_its_end(served, call) -> None:
    wait_until(lambda: served.client.status().tokens_generated >= 240, "it ended")


MOMENTS = [before_it_runs, at_once, in_the_middle, after_its_end]


@contextmanager
def asked(address: str, surface: str):
    """A call under way and its channel."""
    with grpc.insecure_channel(address) as channel:
        if surface == "grpc":
            request = pb.GenerateRequest(text="x", adapters=mix("a"))
            request.stopping.max_tokens, request.stopping.ignore_eos = 240, True
            yield channel, rpc.InferenceStub(channel).Generate(request)
        else:
            stub = kserve_rpc.GRPCInferenceServiceStub(channel)
            yield channel, stub.ModelStreamInfer(iter([kserve_request("x", adapter="a", **LONG)]))


def mix(*names: str) -> pb.AdapterMix:
    return pb.AdapterMix(adapters=[pb.WeightedAdapter(name=name) for name in names])


@pytest.mark.parametrize("how", ["cancels", "vanishes"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("surface", ["grpc", "kserve"])
def test_a_caller_that_leaves_at_any_moment_leaves_nothing(served, surface, moment, how):
    if moment is in_the_middle:
        slowly(served.engine)
    with asked(served.address, surface) as (channel, call):
        moment(served, call)
        if moment is before_it_runs:
            wait_until(lambda: not nothing_left(served.stack), "it is here")
        call.cancel() if how == "cancels" else channel.close()
    served.engines.gate.set()
    wait_until(lambda: nothing_left(served.stack), "nothing is left of it")
    if moment is in_the_middle:
        assert served.client.status().tokens_generated < 240
    result = served.client.generate("y", adapter="a", max_tokens=8, ignore_eos=True)
    assert result.token_ids == served.solo("y", 8, {"a": 1.0})


def test_callers_of_whole_answers_and_vectors_leave_nothing_either(served):
    slowly(served.engine)
    with grpc.insecure_channel(served.address) as channel:
        stub = rpc.InferenceStub(channel)
        answer = pb.GenerateRequest(text="x", n=3, adapters=mix("a", "b"))
        answer.stopping.max_tokens, answer.stopping.ignore_eos = 240, True
        vectors = pb.EmbedRequest()
        vectors.inputs.extend([pb.EmbedInput(text="x" * 200)] * 16)
        calls = [stub.GenerateUnary.future(answer), stub.Embed.future(vectors)]
        wait_until(lambda: served.stack.host.metrics()["rows_busy"] > 0, "they run")
        for call in calls:
            call.cancel()
    wait_until(lambda: nothing_left(served.stack), "nothing is left of them")


def descriptors() -> int:
    return psutil.Process(os.getpid()).num_fds()


@pytest.mark.parametrize("said", [b"", PREFACE], ids=["silent", "greeted"])
@pytest.mark.parametrize("where", ["tcp", "unix"])
def test_a_thousand_idle_connections_hold_nobody_up_and_leave_nothing(tmp_path, where, said):
    path = tmp_path / "agent.sock"
    unix = UnixAddress(str(path))
    with running_stack(tmp_path, ReferenceEngines(), unix_socket=unix) as (stack, address):
        stack.host.switch(World(tmp_path).assignment())
        target = address if where == "tcp" else f"unix:{path}"
        before, idle = descriptors(), []
        try:
            for _ in range(1000):
                idle.append(connected(target))
                idle[-1].sendall(said)
            with Client(target, timeout_s=30) as client:
                assert client.generate("x", max_tokens=4, ignore_eos=True).usage.completion_tokens
        finally:
            for connection in idle:
                connection.close()
        wait_until(lambda: descriptors() <= before + 8, "their sockets are closed")
        with Client(target, timeout_s=30) as client:
            assert client.status().state == "serving"


def connected(target: str) -> socket.socket:
    if target.startswith("unix:"):
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(20)
        made.connect(target.removeprefix("unix:"))
        return made
    host, port = target.rsplit(":", 1)
    return socket.create_connection((host, int(port)), 20)
