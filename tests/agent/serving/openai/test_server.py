"""The server itself: who may listen where, keys, TLS, sockets, draining."""

from __future__ import annotations

import logging
import os
import socket
import ssl
import stat
import threading

import httpx
import openai
import pytest

from remora_agent.local_host import HostSettings
from remora_agent.runtime.options import RuntimeOptions
from remora_agent.serving.address import TcpAddress, UnixAddress
from remora_agent.serving.openai.keys import VARIABLE, ApiKeys, load_keys
from remora_agent.serving.openai.server import OpenAiServer
from remora_agent.serving.openai.settings import OpenAiOptions, openai_options
from remora_agent.serving.router import Router
from remora_agent.serving.tls import ServerTls
from remora_agent.telemetry.observers import Observing
from remora_agent.telemetry.request_log import RequestLog
from remora_contract.errors import DocumentInvalid, Refused, RequestInvalid
from tests.agent.serving.openai.conftest import LOOPBACK, serving
from tests.support.serving import ReferenceEngines, World, running_stack
from tests.support.tls import make_authority

KEY = "k" * 32
ASK = {"model": "base", "prompt": "x", "max_tokens": 2}


def write_keys(tmp_path, text: str, mode: int = 0o600):
    path = tmp_path / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_with_a_key_set_only_its_holders_are_answered(tmp_path):
    keys = load_keys(write_keys(tmp_path, f"{KEY}\n\n{'o' * 16}\n"), {VARIABLE: "e" * 20})
    with serving(tmp_path, keys) as http:
        for key in (KEY, "o" * 16, "e" * 20):
            with openai.OpenAI(base_url=f"{http.url}/v1", api_key=key) as client:
                assert client.models.list().data
        for header in (
            {},
            {"authorization": KEY},
            {"authorization": f"Basic {KEY}"},
            {"authorization": f"Bearer {KEY}x"},
            {"authorization": "Bearer"},
            {"authorization": b"Bearer \xff\xfe"},
        ):
            reply = http.raw.get("/v1/models", headers=header)
            assert reply.status_code == 401, header
            assert reply.json()["error"]["code"] == "invalid_api_key"
            assert http.raw.post("/v1/completions", json=ASK, headers=header).status_code == 401
        assert http.raw.get("/health").status_code == 200
        page = {"authorization": f"Bearer {KEY}", "origin": "https://page.example"}
        assert http.raw.get("/v1/models", headers=page).status_code == 200


def test_without_a_key_web_pages_are_turned_away(http):
    reply = http.raw.post("/v1/completions", json=ASK, headers={"origin": "https://page.example"})
    assert reply.status_code == 403


def test_a_key_is_never_logged(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    with serving(tmp_path, load_keys(None, {VARIABLE: KEY})) as http:
        http.raw.get("/v1/models", headers={"authorization": f"Bearer {KEY}"})
        http.raw.get("/v1/models", headers={"authorization": "Bearer stolen-secret"})
    assert caplog.records
    for secret in (KEY, "stolen-secret"):
        assert all(secret not in str(vars(record)) for record in caplog.records)


@pytest.mark.parametrize(
    ("text", "mode", "named"),
    [
        ("", 0o600, "key on each line"),
        ("short\n", 0o600, "at least 16"),
        ("k" * 20 + " x\n", 0o600, "without spaces"),
        (KEY, 0o644, "chmod"),
        (KEY + "\n" + "k" * (1 << 17), 0o600, "bytes at most"),
    ],
)
def test_a_file_of_keys_that_is_wrong_is_refused(tmp_path, text, mode, named):
    with pytest.raises(DocumentInvalid, match=named) as caught:
        load_keys(write_keys(tmp_path, text, mode), {})
    assert "kkkk" not in str(caught.value)


def test_a_missing_file_and_a_short_variable_are_refused(tmp_path):
    with pytest.raises(DocumentInvalid, match="cannot be read"):
        load_keys(tmp_path / "none", {})
    with pytest.raises(DocumentInvalid, match=VARIABLE):
        load_keys(None, {VARIABLE: "short"})
    assert not load_keys(None, {})


def test_off_loopback_tls_and_a_key_are_both_required(tmp_path):
    everywhere, keys = TcpAddress("0.0.0.0", 0), ApiKeys((b"x",))
    pair = make_authority(tmp_path / "ca").issue("agent", server=True)
    tls = ServerTls(pair.certificate, pair.key)
    for options, named in (
        (OpenAiOptions(everywhere), "TLS"),
        (OpenAiOptions(everywhere, keys=keys), "TLS"),
        (OpenAiOptions(everywhere, tls), "API keys"),
    ):
        with pytest.raises(Refused, match=named):
            OpenAiServer(Router(), options)
    with pytest.raises(Refused, match="TLS"):
        openai_options("0.0.0.0:1", None, None, None, {VARIABLE: KEY})
    OpenAiServer(Router(), OpenAiOptions(everywhere, tls, keys)).stop()


def test_off_means_off():
    assert openai_options(None, None, None, None, {}) is None
    with pytest.raises(RequestInvalid):
        openai_options("nowhere", None, None, None, {})


def test_tls_is_spoken_with_the_certificate_that_was_given(tmp_path):
    authority = make_authority(tmp_path / "ca")
    pair = authority.issue("agent", server=True)
    options = OpenAiOptions(LOOPBACK, ServerTls(pair.certificate, pair.key))
    context = ssl.create_default_context(cafile=str(authority.certificate))
    with running_stack(tmp_path, ReferenceEngines(), openai=options) as (stack, _):
        stack.host.switch(World(tmp_path).assignment())
        target = stack.openai_address.target()
        with httpx.Client(verify=context) as client:
            assert client.get(f"https://{target}/health").status_code == 200
        with httpx.Client() as plain, pytest.raises(httpx.HTTPError):
            plain.get(f"http://{target}/health")


def test_a_certificate_that_does_not_fit_its_key_is_refused(tmp_path):
    authority = make_authority(tmp_path / "ca")
    one, two = authority.issue("one", server=True), authority.issue("two", server=True)
    with pytest.raises(DocumentInvalid, match="cannot be used"):
        OpenAiServer(Router(), OpenAiOptions(LOOPBACK, ServerTls(one.certificate, two.key)))


def test_a_unix_socket_is_served_and_belongs_to_the_group(tmp_path):
    path = tmp_path / "h.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))  # what a process that was killed leaves behind
    options = OpenAiOptions(UnixAddress(str(path)))
    with running_stack(tmp_path, ReferenceEngines(), openai=options) as (stack, _):
        stack.host.switch(World(tmp_path).assignment())
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://agent") as client:
            assert client.post("/v1/completions", json=ASK).status_code == 200
        with pytest.raises(Refused, match="another process"):
            OpenAiServer(Router(), options).start()
    assert not path.exists()


def test_users_who_may_not_call_are_cut_off_and_others_are_known(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "h.sock"
    options = OpenAiOptions(UnixAddress(str(path)))
    for allowed in (frozenset({os.getuid() + 1}), frozenset({os.getuid()})):
        with running_stack(
            tmp_path / str(min(allowed)),
            ReferenceEngines(),
            openai=options,
            allowed_users=allowed,
            observing=Observing(RequestLog.SUMMARY),
        ) as (stack, _):
            stack.host.switch(World(tmp_path / str(min(allowed))).assignment())
            transport = httpx.HTTPTransport(uds=str(path))
            with httpx.Client(transport=transport, base_url="http://agent") as client:
                if os.getuid() in allowed:
                    assert client.post("/v1/completions", json=ASK).status_code == 200
                else:
                    with pytest.raises(httpx.HTTPError):
                        client.post("/v1/completions", json=ASK)
    lines = [r for r in caplog.records if r.message == "request.ended"]
    assert [line.caller for line in lines] == [f"uid:{os.getuid()}"]


def test_a_taken_port_is_refused_and_nothing_stays_behind(tmp_path):
    before = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = OpenAiOptions(TcpAddress("127.0.0.1", taken.getsockname()[1]))
        with (
            pytest.raises(Refused, match="taken"),
            running_stack(tmp_path, ReferenceEngines(), openai=options),
        ):
            pass
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive(), thread.name


def test_loading_and_draining_are_told_with_a_time_to_come_back(tmp_path):
    engines, world = ReferenceEngines(), World(tmp_path)
    options = OpenAiOptions(LOOPBACK)
    with running_stack(tmp_path, engines, openai=options) as (stack, _):
        url = f"http://{stack.openai_address.target()}"
        with httpx.Client(base_url=url) as raw:
            for path in ("/health", "/v1/models"):
                assert raw.get(path).status_code == 503
            reply = raw.post("/v1/completions", json=ASK)
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
            stack.host.switch(world.assignment())
            assert raw.get("/health").status_code == 200
            stack.host.drain(1.0)
            assert raw.get("/health").status_code == 503
            assert raw.post("/v1/completions", json=ASK).status_code == 503


def test_a_full_queue_is_told_as_too_many_requests(tmp_path):
    host = HostSettings(runtime=RuntimeOptions(max_waiting=1))
    engines = ReferenceEngines(rows=1)
    options = OpenAiOptions(LOOPBACK)
    with running_stack(tmp_path, engines, host=host, openai=options) as (stack, _):
        stack.host.switch(World(tmp_path).assignment())
        url = f"http://{stack.openai_address.target()}/v1"
        with openai.OpenAI(base_url=url, api_key="x", max_retries=0) as client:
            engines.gate.clear()
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(**ASK, n=8)
            assert int(caught.value.response.headers["retry-after"]) >= 1
            engines.gate.set()
            assert client.completions.create(**ASK).choices
            status = stack.host.metrics()
            assert (status["queue_depth"], status["rows_busy"]) == (0, 0)
