"""Connections leave descriptors for everything else, whatever the limit is."""

from __future__ import annotations

import resource
import socket
from contextlib import ExitStack

import httpx
import pytest

from remora_agent.client import Client
from remora_agent.serving import descriptors, server, unix_gate
from remora_agent.serving.address import TcpAddress, UnixAddress
from remora_agent.serving.openai import server as http_server
from remora_agent.serving.openai.settings import OpenAiOptions
from tests.agent.serving.company import wait_until
from tests.support.serving import ReferenceEngines, World, running_stack

MOST = 12
NONE = resource.RLIM_INFINITY


@pytest.fixture
def limits(monkeypatch):
    """The process's limit as a test has it: [soft, hard]."""
    now = [1024, 4096]

    def set_limit(kind, pair):
        now[:] = pair

    monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(now))
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    return now


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([1024, 4096], [4096, 4096]),
        ([1024, 1 << 20], [65_536, 1 << 20]),
        ([1024, NONE], [65_536, NONE]),
        ([100_000, 1 << 20], [100_000, 1 << 20]),
        ([NONE, NONE], [NONE, NONE]),
        ([256, 256], [256, 256]),
    ],
)
def test_the_limit_is_raised_as_far_as_it_may_be_and_never_lowered(limits, before, after):
    limits[:] = before
    descriptors.raise_limit()
    assert limits == after


@pytest.mark.parametrize(
    ("soft", "most"), [(65_536, 4096), (NONE, 4096), (1024, 256), (256, 64), (3, 1)]
)
def test_three_full_surfaces_leave_a_quarter_of_the_descriptors(limits, soft, most):
    limits[:] = [soft, NONE]
    assert descriptors.max_connections() == most


def idle(target: str, count: int) -> list[socket.socket]:
    """Connections that say nothing; those beyond the most are closed by the other side."""
    made = []
    for _ in range(count):
        if target.startswith("unix:"):
            made.append(socket.socket(socket.AF_UNIX))
            made[-1].connect(target.removeprefix("unix:"))
        else:
            host, port = target.rsplit(":", 1)
            made.append(socket.create_connection((host, int(port)), 20))
    return made


def test_connections_beyond_the_most_are_closed_and_those_inside_go_on(tmp_path, monkeypatch):
    for module in (server, http_server, unix_gate):
        monkeypatch.setattr(module, "max_connections", lambda: MOST)
    path = tmp_path / "agent.sock"
    options = {
        "openai": OpenAiOptions(TcpAddress("127.0.0.1", 0)),
        "unix_socket": UnixAddress(str(path)),
    }
    with running_stack(tmp_path, ReferenceEngines(), **options) as (stack, address):
        stack.host.switch(World(tmp_path).assignment())
        unix, web = f"unix:{path}", stack.openai_address.target()
        with (
            Client(address, timeout_s=20) as inside,
            Client(unix, timeout_s=20) as gated,
            httpx.Client(base_url=f"http://{web}") as http,
        ):

            def all_answer() -> bool:
                states = {inside.status().state, gated.status().state}
                return states == {"serving"} and http.get("/health").status_code == 200

            assert all_answer()
            with ExitStack() as held:
                for target in (address, unix, web):
                    for connection in idle(target, 3 * MOST):
                        held.enter_context(connection)
                assert all_answer()
                assert all(turned_away(target, 60.0) for target in (address, unix, web))
            assert all_answer()
        for target in (address, unix, web):
            wait_until(lambda target=target: not turned_away(target, 0.3), "it lets in again")


def turned_away(target: str, within_s: float) -> bool:
    """A client of the same library would share a connection that is open already."""
    (connection,) = idle(target, 1)
    with connection:
        connection.settimeout(within_s)
        try:
            return connection.recv(1) == b""
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False


def test_a_connection_to_the_gate_that_never_says_a_word_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(unix_gate, "SILENCE_S", 0.05)
    path = tmp_path / "agent.sock"
    with running_stack(tmp_path, ReferenceEngines(), unix_socket=UnixAddress(str(path))):
        (silent,) = idle(f"unix:{path}", 1)
        with silent:
            silent.settimeout(60)
            assert silent.recv(1) == b""
