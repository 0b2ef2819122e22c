"""Callers that leave, stall or do nothing: their requests end, everybody else goes on."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from contextlib import suppress
from typing import ClassVar

import httpx
import openai
import pytest

from remora_agent.client import Client
from remora_agent.serving.openai import server
from remora_agent.serving.openai.protocol import BoundedProtocol
from tests.agent.serving.openai.conftest import serving
from tests.support.reference_engine import fault

ASK = {"model": "base", "prompt": "x", "max_tokens": 400, "extra_body": {"ignore_eos": True}}
BODY = {"model": "base", "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}


def wait_until(true, what: str) -> None:
    pause = threading.Event()
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if true():
            return
        pause.wait(0.01)
    raise AssertionError(f"never: {what}")


def idle(http) -> bool:
    metrics = http.stack.host.metrics()
    return metrics["rows_busy"] == metrics["queue_depth"] == 0


def steps(http) -> int:
    return len(http.engine.calls.decodes) + len(http.engine.calls.scores)


def slowly(http) -> None:
    """So that an answer is under way when its caller leaves."""
    pause = threading.Event()
    http.engine.before_step = lambda: pause.wait(0.02) and None


def connected(
    http, body: dict, path: str = "/v1/completions", buffer: int | None = None
) -> socket.socket:
    made = socket.socket()
    if buffer is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    made.connect((http.stack.openai_address.host, http.stack.openai_address.port))
    text = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(text)}\r\n\r\n"
    )
    made.sendall(head.encode() + text)
    return made


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_caller_that_leaves_takes_its_request_along(own_http, stream, n):
    http = own_http
    slowly(http)
    with connected(http, {**BODY, "stream": stream, "n": n}):
        wait_until(lambda: http.stack.host.metrics()["rows_busy"] == n, "it runs")
        wait_until(lambda: steps(http) > 2, "tokens come")
    wait_until(lambda: idle(http), "its rows are free")
    assert steps(http) < BODY["max_tokens"]  # long before its end
    assert http.stack.host.metrics()["requests"] >= n


def test_a_caller_that_leaves_while_it_waits_is_forgotten(own_http):
    http = own_http
    http.engines.gate.clear()
    with connected(http, {**BODY, "n": 8}):
        wait_until(lambda: http.stack.host.metrics()["queue_depth"] > 0, "it waits")
    http.engines.gate.set()
    wait_until(lambda: idle(http), "the queue is empty")


def test_a_stream_left_early_through_the_openai_client_frees_its_row(own_http):
    http = own_http
    slowly(http)
    with http.client.completions.create(**ASK, stream=True) as stream:
        next(iter(stream))
    wait_until(lambda: idle(http), "its row is free")

    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=f"{http.url}/v1", api_key="x") as client:
            asking = asyncio.ensure_future(client.completions.create(**ASK))
            await asyncio.sleep(0.1)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(leave())
    wait_until(lambda: idle(http), "its row is free")


def test_a_thousand_idle_connections_hold_nobody_up(own_http):
    http = own_http
    address = http.stack.openai_address
    held = [socket.create_connection((address.host, address.port)) for _ in range(1000)]
    try:
        assert http.raw.get("/health").status_code == 200
        assert http.client.completions.create(**{**ASK, "max_tokens": 4}).choices[0].text
    finally:
        for connection in held:
            connection.close()
    assert http.raw.get("/health").status_code == 200


class Impatient(BoundedProtocol):
    """`ended` holds the peers' addresses of connections that are over."""

    ended: ClassVar[set[object]]

    def connection_lost(self, exc):
        peer = self.transport.get_extra_info("peername")
        super().connection_lost(exc)
        self.ended.add(peer)


@pytest.fixture
def impatient(tmp_path, monkeypatch):
    monkeypatch.setattr(Impatient, "ended", set(), raising=False)
    monkeypatch.setattr(server, "BoundedProtocol", Impatient)
    with serving(tmp_path) as http:
        yield http


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/comp",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100\r\n\r\n{",
    ],
)
def test_a_request_that_never_arrives_is_cut_off(impatient, monkeypatch, sent):
    address = impatient.stack.openai_address
    with monkeypatch.context() as patch:
        patch.setattr(Impatient, "arrival_s", 0.3)
        with socket.create_connection((address.host, address.port)) as slow:
            slow.settimeout(60)
            slow.sendall(sent)
            with suppress(ConnectionResetError):
                assert slow.recv(1) == b""
    assert impatient.raw.get("/health").status_code == 200


def test_a_reader_that_takes_nothing_is_cut_off_and_others_go_on(impatient, monkeypatch):
    """Chunks full of logprobs outgrow every buffer between the two."""
    http = impatient
    monkeypatch.setattr(Impatient, "stall_s", 0.3)
    chat = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 20}
    body = {**BODY, **chat, "n": 8, "max_tokens": 480}
    del body["prompt"]
    with connected(http, body, "/v1/chat/completions", buffer=4096) as slow:
        others = [
            http.client.completions.create(**{**ASK, "max_tokens": 20}).choices[0].text
            for _ in range(3)
        ]
        assert all(others)
        wait_until(lambda: idle(http), "its rows are free")
        wait_until(lambda: slow.getsockname() in Impatient.ended, "it is cut off")
        slow.settimeout(60)
        heard = b""
        with suppress(ConnectionResetError):
            while piece := slow.recv(1 << 20):
                heard += piece
    assert heard.startswith(b"HTTP/1.1 200")
    assert b"[DONE]" not in heard
    assert http.raw.get("/health").status_code == 200


def test_garbage_and_upgrades_are_refused_without_harm(own_http):
    http = own_http
    address = http.stack.openai_address
    for sent in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    ):
        with socket.create_connection((address.host, address.port)) as connection:
            connection.settimeout(60)
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            try:
                answer = connection.recv(1000)
            except ConnectionResetError:
                continue
            assert answer == b"" or answer.startswith(b"HTTP/1.1 40")
    assert http.raw.get("/health").status_code == 200


def test_bytes_that_are_no_http_and_upgrades_fill_no_log(own_http, caplog):
    """Any caller can send them, as many as it likes, before it proves who it is."""
    http = own_http
    address = http.stack.openai_address
    upgrade = (
        b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    )
    with caplog.at_level(logging.WARNING):
        for sent in (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", upgrade):
            with socket.create_connection((address.host, address.port)) as connection:
                connection.settimeout(60)
                connection.sendall(sent)
                assert connection.recv(1000).startswith(b"HTTP/1.1 ")
    assert caplog.messages == []


def test_one_connection_serves_many_requests(http):
    with httpx.Client(base_url=http.url) as client:
        for _ in range(5):
            assert client.get("/v1/models").status_code == 200
            assert client.post("/v1/completions", content=b"{").status_code == 400
            streamed = client.post("/v1/completions", json={**BODY, "max_tokens": 2})
            assert streamed.text.endswith("[DONE]\n\n")


def test_an_engine_fault_ends_a_stream_with_an_error_object(own_http):
    http = own_http
    slowly(http)
    with pytest.raises(openai.APIError, match="backend failed"):
        stream = http.client.completions.create(**ASK, stream=True)
        next(iter(stream))
        http.engine.faults.append(fault())
        list(stream)
    http.engine.faults.append(fault())
    with pytest.raises(openai.InternalServerError):
        http.client.completions.create(**ASK)
    assert http.client.completions.create(**{**ASK, "max_tokens": 2}).choices


def test_an_adapter_that_is_unloaded_ends_its_requests_with_a_reason(own_http):
    http = own_http
    slowly(http)
    stream = http.client.completions.create(**{**ASK, "model": "a"}, stream=True)
    next(iter(stream))
    with Client(http.grpc) as client:
        client.unload_adapter("a", "r1", mode="cancel")
    with pytest.raises(openai.APIError, match="cancelled on the device"):
        list(stream)


@pytest.mark.parametrize("path", ["/v1/completions", "/health"])
@pytest.mark.parametrize("length_first", [True, False])
def test_a_request_with_two_lengths_smuggles_no_second_one(http, path, length_first):
    """By the one it ends with the zero chunk, by the other behind the next request."""
    hidden = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
    body = b"0\r\n\r\n" + hidden
    lengths = [f"Content-Length: {len(body)}", "Transfer-Encoding: chunked"]
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json"]
    lines += lengths if length_first else lengths[::-1]
    address = http.stack.openai_address
    with socket.create_connection((address.host, address.port), 10) as caller:
        caller.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        answer = b""
        while part := caller.recv(1 << 16):  # to its end: the connection is closed
            answer += part
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"not both" in answer
