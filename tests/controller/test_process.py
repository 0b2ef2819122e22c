"""The controller as a process: started, stopped, killed in the middle, started again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack, contextmanager

import grpc
import pytest

from remora_controller.home import Home
from remora_controller.server import Ports
from remora_protos.control.v1 import control_pb2 as cp
from remora_protos.operator.v1 import operator_pb2 as op
from tests.controller.harness import (
    WAIT_S,
    Fleet,
    SimulatedDevice,
    join,
    wait_for,
)
from tests.controller.operating import create_release, online, start

MAIN = "from remora_controller.cli import main; main()"
ANY = "127.0.0.1:0"


class Process:
    """`remora-controller serve`; looks like a ControllerThread to the harness."""

    def __init__(self, home: Home, fleet: str = ANY, **environment: str) -> None:
        self.home = home
        home.listening.unlink(missing_ok=True)
        words = ["--listen", fleet, "--enrol-listen", ANY, "--metrics-listen", ANY]
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, "serve", str(home.root), *words],
            env={**os.environ, **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for("the controller listens", lambda: home.listening.exists() or self._ended())
        found = json.loads(home.listening.read_text())
        assert found.pop("pid") == self.process.pid
        self.ports = Ports(**found)

    def _ended(self) -> bool:
        assert self.process.poll() is None, self.process.communicate()[1]
        return False

    def end(self, number: int = signal.SIGTERM) -> str:
        """What it wrote to standard error."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=WAIT_S)[1]


@contextmanager
def process(home: Home, fleet: str = ANY, **environment: str):
    running = Process(home, fleet, **environment)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.end(signal.SIGKILL)


def test_a_controller_killed_in_the_middle_of_a_rollout_goes_on(home):
    with process(home) as first:
        world = Fleet(first)
        keys = [join(home, first.ports, world.token()) for _ in range(3)]
        devices = [
            SimulatedDevice(a.device_id, world.channel(a.certificate_pem, k)) for a, k in keys
        ]
        for device in devices:
            device.sync()
        rollout_id = start(world, create_release(world))
        wait_for(
            "one device is being changed",
            lambda: any(d.sync() and d.phase == "ASSIGNED" for d in devices),
        )
        first.end(signal.SIGKILL)
        world.close()
    with process(home) as second:
        world = Fleet(second)
        for device, (answer, key) in zip(devices, keys, strict=True):
            device.channel = world.channel(answer.certificate_pem, key)
        done = world.drive(rollout_id, devices, "COMPLETED", "ROLLED_BACK", "PAUSED")
        world.close()
    assert done.state == "COMPLETED"
    assert [d.generation for d in devices] == [1, 1, 1]


def test_devices_reconnect_by_themselves_to_a_restarted_controller(home):
    with process(home) as first:
        world = Fleet(first)
        (device,) = online(world, 1)
        port = first.ports.fleet
        first.end()
        with process(home, f"127.0.0.1:{port}"):

            def answers() -> bool:
                try:
                    return device.sync() is not None
                except grpc.RpcError:
                    return False

            wait_for("the device is answered again", answers)
        world.close()


def test_sigterm_ends_it_cleanly_and_keeps_heartbeats(home):
    with process(home) as first:
        world = Fleet(first)
        (device,) = online(world, 1)
        for _ in range(5):
            device.sync()
        log = first.end()
        world.close()
        assert first.process.returncode == 0
    events = [json.loads(line)["event"] for line in log.splitlines()]
    assert events[-1] == "controller.stopped"
    assert not home.listening.exists()
    from remora_controller.store.sqlite import SqliteStore

    store = SqliteStore(home.database)
    assert store.device(device.device_id).trail.seq == device.seq
    store.close()


def test_systemd_hears_ready_watchdog_and_stopping(home, tmp_path):
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.bind(path)
        s.settimeout(WAIT_S)
        with process(home, NOTIFY_SOCKET=path, WATCHDOG_USEC="200000") as running:
            heard = [s.recv(100), s.recv(100)]
            running.end()
            while heard[-1] != b"STOPPING=1":
                heard.append(s.recv(100))
    assert heard[:2] == [b"READY=1", b"WATCHDOG=1"]


def test_metrics_are_plain_prometheus_text(home):
    with process(home) as running:
        world = Fleet(running)
        online(world, 1)
        url = f"http://127.0.0.1:{running.ports.metrics}/metrics"
        with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
            text = answer.read().decode()
        assert "remora_controller_syncs_total 1.0" in text
        assert "remora_controller_joins_total 1.0" in text
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(url.replace("metrics", ""), timeout=WAIT_S)
        world.close()


def test_connections_that_say_nothing_do_not_hold_up_the_end(home):
    """Half a TLS hello, half a request: on every port, more than a few."""
    with process(home) as running:
        ports = vars(running.ports).values()
        with ExitStack() as stack:
            for port in [p for p in ports for _ in range(20)]:
                slow = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                slow.sendall(b"GE")
            world = Fleet(running)
            (device,) = online(world, 1)
            watch = device.fleet.Watch(cp.WatchRequest())
            began = time.monotonic()
            said = running.end()
            assert time.monotonic() - began < WAIT_S / 2
            assert watch.code() is not None
            world.close()
    assert running.process.returncode == 0
    assert "Traceback" not in said


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", MAIN, *words], capture_output=True, text=True, check=False
    )


def test_a_second_controller_in_the_same_directory_is_refused(home):
    with process(home):
        ended = run("serve", str(home.root), "--listen", ANY)
    assert ended.returncode == 1
    assert "another controller already serves" in ended.stderr


def test_a_port_in_use_is_named(home):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        ended = run("serve", str(home.root), "--listen", f"127.0.0.1:{s.getsockname()[1]}")
    assert ended.returncode == 1
    assert "is another program there?" in ended.stderr


def test_init_then_operator_make_credentials_that_work(tmp_path):
    directory, out = tmp_path / "fleet", tmp_path / "alice"
    assert run("init", str(directory), "--address", "127.0.0.1").returncode == 0
    assert run("init", str(directory)).returncode == 1
    assert run("operator", "add", str(directory), "alice", str(out)).returncode == 0
    assert run("operator", "add", str(directory), "alice", str(out)).returncode == 1
    home = Home(directory)
    with process(home) as running:
        credentials = grpc.ssl_channel_credentials(
            *((out / n).read_bytes() for n in ("ca.pem", "operator.key", "operator.pem"))
        )
        from remora_protos.operator.v1 import operator_pb2_grpc as op_grpc
        from tests.controller.harness import OPTIONS

        with grpc.secure_channel(
            f"127.0.0.1:{running.ports.fleet}", credentials, OPTIONS
        ) as channel:
            stub = op_grpc.OperatorStub(channel)
            assert not stub.ListDevices(op.ListDevicesRequest(), timeout=WAIT_S).devices


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["serve", "nowhere"], "remora-controller init nowhere"),
        (["init", "somewhere", "--address", "bad name"], "use a name or IP"),
    ],
)
def test_mistakes_say_what_to_do(tmp_path, words, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = run(*words)
    assert ended.returncode == 1
    assert said in ended.stderr
