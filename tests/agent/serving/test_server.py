"""The server itself: addresses, TLS, health, reflection, metrics, bounds."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
import subprocess
import sys
import threading
import urllib.request

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from remora_agent.client import Client, ClientTls, Retry
from remora_agent.serving.address import TcpAddress, UnixAddress
from remora_agent.serving.server import InferenceServer
from remora_agent.serving.stack import ServingStack, StackOptions
from remora_agent.serving.tls import ServerTls
from remora_contract.errors import InternalFault, Refused, Unavailable
from remora_protos.inference.v1 import inference_pb2 as pb
from remora_protos.inference.v1 import inference_pb2_grpc as rpc
from tests.support.serving import running_stack
from tests.support.tls import make_authority

OPTIONS = {"max_tokens": 4, "ignore_eos": True, "temperature": 0.0}
OWN_POOL = ("grpc.use_local_subchannel_pool", 1)
LOOPBACK = TcpAddress("127.0.0.1", 0)


def health_of(address: str, service: str = "") -> int:
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=60).status


def wait_for_health(address: str, wanted: int) -> None:
    pause = threading.Event()
    for _ in range(500):
        if health_of(address) == wanted:
            return
        pause.wait(0.01)
    raise AssertionError("health never became what it should")


def test_before_a_model_is_loaded_the_agent_says_so_everywhere(tmp_path, engines, world):
    with running_stack(tmp_path, engines) as (stack, address), Client(address) as client:
        assert client.status().state == "loading"
        with pytest.raises(Unavailable, match="no model"):
            client.generate("x")
        wait_for_health(address, health_pb2.HealthCheckResponse.NOT_SERVING)
        stack.host.switch(world.assignment())
        assert client.generate("x", **OPTIONS).text is not None
        wait_for_health(address, health_pb2.HealthCheckResponse.SERVING)
        name = pb.DESCRIPTOR.services_by_name["Inference"].full_name
        assert health_of(address, name) == health_pb2.HealthCheckResponse.SERVING


def test_a_client_that_was_asked_to_waits_for_the_model(tmp_path, engines, world):
    with running_stack(tmp_path, engines) as (stack, address):
        loader = threading.Timer(0.3, lambda: stack.host.switch(world.assignment()))
        loader.start()
        with Client(address, retry=Retry(attempts=50, timeout_s=20)) as client:
            assert len(client.generate("x", **OPTIONS).token_ids) == 4
        loader.join()


def test_the_services_describe_themselves(served):
    with grpc.insecure_channel(served.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answer = next(iter(stub.ServerReflectionInfo(iter([request]), timeout=60)))
    names = {s.name for s in answer.list_services_response.service}
    assert {f"remora.inference.v1.{s}" for s in ("Inference", "Adapters", "UseCases")} <= names
    assert "grpc.health.v1.Health" in names


def test_a_unix_socket_serves_its_owner_and_group_only(tmp_path, engines, world):
    path = tmp_path / "remora.sock"
    with running_stack(tmp_path, engines, f"unix:{path}") as (stack, address):
        stack.host.switch(world.assignment())
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        with Client(address) as client:
            assert len(client.generate("x", **OPTIONS).token_ids) == 4


def test_a_taken_port_is_refused_by_name(engines):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        options = StackOptions(listen=TcpAddress("127.0.0.1", port))
        stack = ServingStack(options, engines=engines)
        with pytest.raises(Refused, match=str(port)):
            stack.start()


def test_a_unix_socket_in_use_is_refused_and_stays_with_its_owner(tmp_path, engines, world):
    path = tmp_path / "remora.sock"
    with running_stack(tmp_path, engines, f"unix:{path}") as (stack, address):
        stack.host.switch(world.assignment())
        second = ServingStack(StackOptions(listen=UnixAddress(str(path))), engines=engines)
        with pytest.raises(Refused, match="another process"):
            second.start()
        with Client(address) as client:
            assert len(client.generate("x", **OPTIONS).token_ids) == 4


def test_the_socket_of_a_killed_process_is_taken_over(tmp_path, engines, world):
    path = tmp_path / "remora.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    assert path.exists()
    with running_stack(tmp_path, engines, f"unix:{path}") as (stack, address):
        stack.host.switch(world.assignment())
        with Client(address) as client:
            assert client.status().state == "serving"


def test_a_server_that_cannot_start_says_so_instead_of_waiting(engines, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    monkeypatch.setattr(InferenceServer, "_add_services", lambda self, server: 1 / 0)
    with pytest.raises(InternalFault, match="did not start"):
        ServingStack(StackOptions(listen=LOOPBACK), engines=engines).start()


def test_a_burst_of_calls_is_answered_or_refused_but_never_reset(served):
    """More at once than gRPC's own 1000 that may wait for a server to pick them up."""

    async def main():
        channels = [grpc.aio.insecure_channel(served.address, [OWN_POOL]) for _ in range(8)]
        stubs = [rpc.EngineServiceStub(channel) for channel in channels]
        calls = [stubs[i % 8].Status(pb.EngineStatusRequest()) for i in range(3000)]
        codes = {await call.code() for call in calls}
        for channel in channels:
            await channel.close()
        return codes

    assert asyncio.run(main()) <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}


def test_calls_that_one_connection_begins_and_never_sends_leave_room_for_others(served):
    """A client that forgets its streams, or means to lock everybody out."""

    async def main():
        async with grpc.aio.insecure_channel(served.address, [OWN_POOL]) as channel:
            begin = channel.stream_stream("/remora.inference.v1.Inference/Generate")
            begun = [begin() for _ in range(1100)]
            await begun[0].wait_for_connection()
            await asyncio.sleep(0.5)  # until all have left that may
            async with grpc.aio.insecure_channel(served.address, [OWN_POOL]) as other:
                stub = rpc.EngineServiceStub(other)
                codes = [await stub.Status(pb.EngineStatusRequest()).code() for _ in range(3)]
            for call in begun:
                call.cancel()
            return codes

    assert asyncio.run(main()) == [grpc.StatusCode.OK] * 3


def test_plaintext_beyond_this_machine_is_refused_before_anything_listens(engines):
    with pytest.raises(Refused, match="--tls-cert"):
        ServingStack(StackOptions(listen=TcpAddress("0.0.0.0", 0)), engines=engines)


def test_tls_serves_those_who_trust_its_authority(tmp_path, engines, world):
    ca = make_authority(tmp_path / "ca")
    server = ca.issue("agent", server=True)
    tls = ServerTls(server.certificate, server.key)
    with running_stack(tmp_path, engines, tls=tls) as (stack, address):
        stack.host.switch(world.assignment())
        with Client(address, tls=ClientTls(ca.certificate), timeout_s=60) as client:
            assert len(client.generate("x", **OPTIONS).token_ids) == 4
        stranger = make_authority(tmp_path / "other")
        with (
            Client(address, tls=ClientTls(stranger.certificate), timeout_s=60) as client,
            pytest.raises(Unavailable),
        ):
            client.status()
        with Client(address, timeout_s=60) as client, pytest.raises(Unavailable):
            client.status()


def test_with_a_client_authority_only_its_certificates_are_let_in(tmp_path, engines, world):
    ca = make_authority(tmp_path / "ca")
    server, client_pair = ca.issue("agent", server=True), ca.issue("app")
    tls = ServerTls(server.certificate, server.key, ca.certificate)
    with running_stack(tmp_path, engines, tls=tls) as (stack, address):
        stack.host.switch(world.assignment())
        known = ClientTls(ca.certificate, client_pair.certificate, client_pair.key)
        with Client(address, tls=known, timeout_s=60) as client:
            assert client.status().state == "serving"
        foreign = make_authority(tmp_path / "other").issue("app")
        for tls_of in (
            ClientTls(ca.certificate),
            ClientTls(ca.certificate, foreign.certificate, foreign.key),
        ):
            with (
                Client(address, tls=tls_of, timeout_s=60) as client,
                pytest.raises(Unavailable),
            ):
                client.status()


def test_metrics_are_scraped_over_http(tmp_path, engines, world):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    listen = TcpAddress("127.0.0.1", port)
    with running_stack(tmp_path, engines, metrics_listen=listen) as (stack, address):
        stack.host.switch(world.assignment())
        with Client(address) as client:
            client.generate("x", **OPTIONS)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            text = answer.read().decode()
    assert "remora_requests_total 1.0" in text
    assert "# TYPE remora_completion_tokens_total counter" in text
    assert "# TYPE remora_queue_depth gauge" in text


def test_metrics_stay_on_this_machine(engines):
    options = StackOptions(LOOPBACK, metrics_listen=TcpAddress("0.0.0.0", 0))
    stack = ServingStack(options, engines=engines)
    with pytest.raises(Refused, match="loopback"):
        stack.start()


def test_draining_refuses_new_calls_and_lets_running_ones_end(served):
    pause = threading.Event()
    served.engine.before_step = lambda: pause.wait(0.005)
    stream = served.client.stream("hello", **{**OPTIONS, "max_tokens": 100})
    next(stream)
    draining = threading.Thread(target=served.stack.host.drain, args=(20.0,))
    draining.start()
    while served.client.status().state != "draining":
        pause.wait(0.005)
    with pytest.raises(Unavailable, match="shutting down"):
        served.client.generate("late")
    list(stream)
    assert len(stream.result.token_ids) == 100
    draining.join()


def test_what_does_not_end_while_draining_is_told_why(served):
    served.engines.gate.clear()
    stream = served.client.stream("hello", **OPTIONS)
    threading.Timer(0.2, served.engines.gate.set).start()
    served.stack.host.drain(0.05)
    with pytest.raises(Unavailable):
        list(stream)


def test_importing_the_client_loads_no_model_library():
    code = (
        "import sys, json, remora_agent.client\n"
        "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert loaded & {"grpc", "remora_contract"} == {"grpc", "remora_contract"}
    heavy = {"onnxruntime", "onnx", "onnx_ir", "torch", "tokenizers", "numpy", "stamina", "jinja2"}
    assert not loaded & heavy
