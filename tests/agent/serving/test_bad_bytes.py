"""Bytes that are no request: refused with a reason, on every method, and nothing else happens."""

from __future__ import annotations

import logging
import socket
import struct
from contextlib import suppress

import grpc
import pytest

from remora_protos.inference.v1 import inference_pb2 as pb
from tests.agent.serving.company import LONG, kserve_request, nothing_left, slowly, wait_until

OWN, KSERVE = "/remora.inference.v1.", "/inference.GRPCInferenceService/"


def same(raw: bytes) -> bytes:
    return raw


NO_MESSAGES = [
    b"\x0a\x02\xff\xfe",  # field 1, a string: no UTF-8
    b"\xff" * 40,
    b"\x0a\xff\xff\xff\xff\x0f",  # a length beyond the end
    b"\x9b\x06" * 5000,  # groups in groups
]
METHODS = [
    f"{OWN}Inference/GenerateUnary",
    f"{OWN}Inference/Generate",
    f"{OWN}Inference/Cancel",
    f"{OWN}Inference/Tokenize",
    f"{OWN}Inference/Embed",
    f"{OWN}Adapters/Load",
    f"{OWN}UseCases/Set",
    f"{KSERVE}ModelInfer",
    f"{KSERVE}ModelReady",
    f"{KSERVE}RepositoryModelLoad",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
]


@pytest.mark.parametrize("method", METHODS)
def test_bytes_that_are_no_message_are_refused_and_fill_no_log(served, method, caplog):
    with grpc.insecure_channel(served.address) as channel:
        for raw in NO_MESSAGES:
            with pytest.raises(grpc.RpcError) as refused:
                list(channel.unary_stream(method, same, same)(raw, timeout=20))
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT, method
            assert "UTF-8" in refused.value.details()
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert served.client.status().state == "serving"


def test_bytes_that_are_no_message_end_a_kserve_stream_and_its_requests(served, caplog):
    slowly(served.engine)
    long = kserve_request("x", **LONG).SerializeToString()
    with grpc.insecure_channel(served.address) as channel:
        stream = channel.stream_stream(f"{KSERVE}ModelStreamInfer", same, same)
        heard = stream(iter([long, NO_MESSAGES[0]]), timeout=20)
        with pytest.raises(grpc.RpcError) as refused:
            list(heard)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    wait_until(lambda: nothing_left(served.stack), "its row is free")
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_messages_beyond_the_bound_are_refused_on_every_method_that_takes_text(served):
    large = b"\x12" + b"\x80\x80\xc0\x02" + b"x" * (5 << 20)  # field 2, 5 MiB
    with grpc.insecure_channel(served.address, [("grpc.max_send_message_length", -1)]) as channel:
        for method in METHODS[:4] + METHODS[7:8]:
            with pytest.raises(grpc.RpcError) as refused:
                list(channel.unary_stream(method, same, same)(large, timeout=20))
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert nothing_left(served.stack)


def test_a_number_that_is_none_is_refused_by_name_on_the_wire(served):
    with grpc.insecure_channel(served.address) as channel:
        ask = channel.unary_unary(f"{OWN}Inference/GenerateUnary", same, same)
        for value in (float("nan"), float("inf"), -1.0):
            sampling = b"\x0d" + struct.pack("<f", value)  # field 1, a float
            raw = b"\x12\x01x" + b"\x42" + bytes([len(sampling)]) + sampling
            assert pb.GenerateRequest.FromString(raw).sampling.HasField("temperature")
            with pytest.raises(grpc.RpcError) as refused:
                ask(raw, timeout=20)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "temperature" in refused.value.details()


@pytest.mark.parametrize("sent", [b"", b"\x00" * 100, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01"])
def test_what_is_no_http2_is_refused_without_harm(served, sent):
    host, port = served.address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), 20) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            while connection.recv(1 << 16):
                pass
    assert served.client.status().state == "serving"
