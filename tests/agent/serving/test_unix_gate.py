"""The unix socket: who may come in, how they are known, and that bytes pass as they are."""

from __future__ import annotations

import logging
import os
import socket
import stat

import pytest

from remora_agent.client import Client
from remora_agent.serving.address import UnixAddress
from remora_agent.serving.unix_gate import user_ids
from remora_agent.telemetry.observers import Observing
from remora_agent.telemetry.request_log import RequestLog
from remora_contract.errors import Refused, RequestInvalid, Unavailable
from tests.support.serving import ReferenceEngines, World, running_stack

LOGGED = Observing(request_log=RequestLog.SUMMARY)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "agent.sock"


def serving(tmp_path, path, **options):
    return running_stack(
        tmp_path, ReferenceEngines(), unix_socket=UnixAddress(str(path)), **options
    )


def test_one_agent_answers_on_tcp_and_on_a_unix_socket_at_once(tmp_path, path):
    with serving(tmp_path, path) as (stack, address):
        stack.host.switch(World(tmp_path).assignment())
        with Client(address) as tcp, Client(f"unix:{path}") as unix:
            assert tcp.generate("abc", max_tokens=4).text == unix.generate("abc", max_tokens=4).text
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert not path.exists()


def test_a_caller_on_the_socket_is_known_by_its_user_id(tmp_path, path, caplog):
    with (
        caplog.at_level(logging.INFO, "remora.requests"),
        serving(tmp_path, path, observing=LOGGED) as (stack, address),
    ):
        stack.host.switch(World(tmp_path).assignment())
        with Client(f"unix:{path}") as unix, Client(address) as tcp:
            unix.generate("abc", max_tokens=2)
            tcp.generate("abc", max_tokens=2)
    lines = [r for r in caplog.records if r.message == "request.ended"]
    assert [line.caller for line in lines] == [f"uid:{os.getuid()}", "ip:127.0.0.1"]


def test_a_client_that_a_caller_names_is_told_beside_who_called(tmp_path, path, caplog):
    with (
        caplog.at_level(logging.INFO, "remora.requests"),
        serving(tmp_path, path, observing=LOGGED) as (stack, _),
    ):
        stack.host.switch(World(tmp_path).assignment())
        with Client(f"unix:{path}") as unix:
            unix.generate("abc", max_tokens=2, client="uid:0")
    (line,) = [r for r in caplog.records if r.message == "request.ended"]
    assert (line.caller, line.client) == (f"uid:{os.getuid()}", "uid:0")


def test_a_user_who_is_not_allowed_gets_no_answer_and_the_others_do(tmp_path, path):
    strangers = frozenset({os.getuid() + 1})
    with serving(tmp_path, path, allowed_users=strangers) as (stack, address):
        stack.host.switch(World(tmp_path).assignment())
        with Client(f"unix:{path}", timeout_s=60) as unix, pytest.raises(Unavailable):
            unix.status()
        with Client(address) as tcp:
            assert tcp.status().state == "serving"


def test_a_long_prompt_passes_as_it_is(tmp_path, path):
    text = "x" * (1 << 20)
    with serving(tmp_path, path) as (stack, _):
        stack.host.switch(World(tmp_path).assignment())
        with Client(f"unix:{path}", timeout_s=60) as client:
            assert len(client.tokenize(text).ids) == len(text)


def test_an_answer_too_long_for_a_message_is_refused_with_what_to_do(tmp_path, path):
    with serving(tmp_path, path) as (stack, _):
        stack.host.switch(World(tmp_path).assignment())
        with (
            Client(f"unix:{path}", timeout_s=60) as client,
            pytest.raises(RequestInvalid, match="send the input in parts"),
        ):
            client.tokenize("x" * (3 << 20))


def test_hundreds_of_idle_connections_do_not_keep_others_out(tmp_path, path):
    with serving(tmp_path, path) as (stack, _):
        stack.host.switch(World(tmp_path).assignment())
        idle = []
        try:
            for _ in range(300):
                idle.append(connection := socket.socket(socket.AF_UNIX))
                connection.connect(str(path))
            with Client(f"unix:{path}", timeout_s=20) as client:
                assert client.status().state == "serving"
        finally:
            for connection in idle:
                connection.close()


def test_a_file_that_is_no_socket_is_refused_and_stays(tmp_path, path):
    path.write_text("keep me")
    with pytest.raises(Refused, match="no socket"), serving(tmp_path, path):
        pass
    assert path.read_text() == "keep me"


def test_users_are_named_or_numbered():
    assert user_ids(["root", "12"]) == {0, 12}
    with pytest.raises(RequestInvalid, match="nobody-of-here"):
        user_ids(["nobody-of-here"])
