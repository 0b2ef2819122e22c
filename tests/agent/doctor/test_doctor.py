"""doctor: every check names what it found and the next step; only what is needed fails."""

from __future__ import annotations

import json
import re
import socket
import sys
from datetime import datetime, timedelta, timezone

import pytest
from typer.testing import CliRunner

from remora_agent.cli import build_app
from remora_agent.config import AgentConfig, ServingConfig, TelemetryConfig
from remora_agent.control.identity import load_identity
from remora_agent.control.join import JoinPlan, join
from remora_agent.control.layout import StateLayout, exclusive
from remora_agent.doctor import device, hardware
from remora_agent.doctor.check import Verdict, fail, failed, ok, warn
from remora_contract.errors import Unavailable
from tests.support.fake_controller import FakeController


def run(*arguments: str):
    return CliRunner().invoke(build_app(), ["doctor", *arguments])


@pytest.fixture
def controller(tmp_path):
    made = FakeController(tmp_path / "repository").start()
    yield made
    made.stop()


@pytest.fixture
def layout(tmp_path):
    made = StateLayout(tmp_path / "state")
    made.create()
    return made


@pytest.fixture
def identity(controller, layout):
    join(JoinPlan(controller.enrolment_address, controller.token, layout.identity, {}))
    return load_identity(layout.identity)


def write_config(tmp_path, layout) -> str:
    path = tmp_path / "agent.toml"
    path.write_text(
        f'state_dir = "{layout.root}"\n'
        '[serving]\nlisten = "127.0.0.1:0"\n[telemetry]\nmetrics_listen = ""\n'
        "[limits]\ndisk_floor_bytes = 0\n"
    )
    return str(path)


def test_this_machine_can_serve_with_onnxruntime():
    result = run("--json")
    checks = {c["name"]: c for c in json.loads(result.stdout)}
    assert result.exit_code == 0
    assert checks["onnxruntime"]["verdict"] == "ok"
    assert re.match(r"\d+\.\d+", checks["onnxruntime"]["found"])
    assert {"processor", "memory", "clock", "tensorrt", "cuda driver", "jtop", "nvml"} <= set(
        checks
    )


def test_everything_that_is_not_well_has_a_next_step():
    for check in json.loads(run("--json").stdout):
        assert check["verdict"] == "ok" or check["next_step"], check


def test_the_table_shows_what_to_install_letter_by_letter(monkeypatch):
    monkeypatch.setitem(sys.modules, "jtop", None)
    text = " ".join(run().stdout.split())
    assert "'remora[jetson]'" in text


def test_a_device_that_has_not_joined_fails_and_says_how(tmp_path, layout):
    result = run("--config", write_config(tmp_path, layout), "--json")
    checks = {c["name"]: c for c in json.loads(result.stdout)}
    assert result.exit_code == 1
    assert "remora-agent join" in checks["identity"]["next_step"]


def test_a_joined_device_is_well(tmp_path, layout, identity):
    result = run("--config", write_config(tmp_path, layout), "--json")
    checks = {c["name"]: c for c in json.loads(result.stdout)}
    assert result.exit_code == 0, result.stdout
    assert checks["controller"]["verdict"] == "ok"
    assert checks["identity"]["verdict"] == "ok"


def test_an_unreachable_controller_is_a_warning_because_the_device_serves_on(identity):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    check = device.check_controller(identity, address, datetime.now(timezone.utc))
    assert check.verdict is Verdict.WARN and "serves what it has" in check.next_step


def test_somebody_elses_controller_fails(identity, tmp_path):
    other = FakeController(tmp_path / "other").start()
    try:
        now = datetime.now(timezone.utc)
        check = device.check_controller(identity, other.fleet_address, now)
    finally:
        other.stop()
    assert check.verdict is Verdict.FAIL and "not signed by the expected CA" in check.next_step


@pytest.mark.parametrize(
    ("days", "verdict", "text"),
    [
        (0, Verdict.OK, "certificate until"),
        (21, Verdict.OK, "renewal is due"),
        (28, Verdict.WARN, "join"),
        (31, Verdict.FAIL, "it renews over fleet.example:7441"),
        (31, Verdict.FAIL, "join fleet.example:7441 --token TOKEN --force"),
        (-1, Verdict.FAIL, "not valid yet"),
    ],
)
def test_a_certificates_age_is_judged(identity, days, verdict, text):
    now = datetime.now(timezone.utc) + timedelta(days=days)
    check = device.check_certificate(identity, "fleet.example:7441", now)
    assert check.verdict is verdict
    assert text in check.found + check.next_step


def test_a_taken_port_fails_unless_the_agent_itself_has_it(layout):
    with socket.create_server(("127.0.0.1", 0)) as server:
        listen = f"127.0.0.1:{server.getsockname()[1]}"
        assert device.check_port("serving.listen", listen, running=False).verdict is Verdict.FAIL
        assert device.check_port("serving.listen", listen, running=True).verdict is Verdict.OK
    assert device.check_port("serving.listen", "unix:/run/x", running=False).verdict is Verdict.OK


def test_a_running_agent_is_noticed(layout):
    assert not device.agent_runs(layout)
    with exclusive(layout):
        assert device.agent_runs(layout)


def test_a_state_directory_that_cannot_be_written_fails(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    check = device.check_state_dir(StateLayout(blocker / "state"))
    assert check.verdict is Verdict.FAIL


def test_disk_memory_threads_and_clock_are_judged():
    assert device.check_disk(100, 100).verdict is Verdict.FAIL
    assert device.check_disk(101, 100).verdict is Verdict.OK
    assert hardware.check_memory(8 << 30, 1 << 29).verdict is Verdict.WARN
    assert device.check_threads(ServingConfig(threads=9), 8).verdict is Verdict.WARN
    assert hardware.check_clock(0.0).verdict is Verdict.FAIL


@pytest.mark.parametrize(
    ("backends", "verdict"),
    [({}, Verdict.FAIL), ({"onnxruntime": "1.17.1"}, Verdict.FAIL)],
)
def test_a_missing_or_old_onnxruntime_fails_with_the_command(backends, verdict):
    check = hardware.check_onnxruntime(backends)
    assert check.verdict is verdict and "pip install" in check.next_step


def test_a_processor_without_simd_is_a_warning(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags : fpu mmx\n")
    assert hardware.check_processor(tmp_path / "cpuinfo").verdict is Verdict.WARN


def test_a_sensor_that_does_not_open_says_what_to_install():
    def absent():
        raise Unavailable("pip install x")

    assert hardware.check_sensor("jtop", absent) == warn("jtop", "not available", "pip install x")


def test_only_failures_fail():
    assert not failed([ok("a", "b"), warn("a", "b")])
    assert failed([ok("a", "b"), fail("a", "b", "c")])


def test_configuration_defaults_are_accepted_by_all_checks(layout):
    config = AgentConfig(str(layout.root), telemetry=TelemetryConfig(metrics_listen=""))
    names = [c.name for c in device.device_checks(config)]
    assert names[0] == "state_dir" and names[-1] == "systemd unit"
