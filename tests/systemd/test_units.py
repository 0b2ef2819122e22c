"""The shipped units: systemd accepts them, they are sandboxed, and the agent speaks Type=notify."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from remora_agent.config import load_config
from remora_agent.control.activation import MAX_ABNORMAL_EXITS, MAX_CUT_WORK
from tests.agent.control.test_killed import ROOT, Fleet

UNITS = ROOT / "systemd"
DOCS = ROOT / "docs" / "agent.md"
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def directives(unit: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (UNITS / unit).read_text().splitlines():
        key, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


@needs_systemd
@pytest.mark.parametrize("name", ["remora-agent", "remora-controller"])
def test_systemd_accepts_the_unit(tmp_path, name):
    text = (UNITS / f"{name}.service").read_text()
    installed = tmp_path / "bin" / name
    installed.parent.mkdir()
    installed.write_text("#!/bin/sh\n")
    installed.chmod(0o755)
    text, count = re.subn(rf"/opt/remora/bin/{name}", str(installed), text)
    assert count == 1
    unit = tmp_path / f"{name}.service"
    unit.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True
    )
    complaints = [line for line in done.stderr.splitlines() if name in line]
    assert (done.returncode, complaints) == (0, [])


def test_systemd_gives_up_after_the_agent_has_given_up_what_takes_it_down():
    starts = int(directives("remora-agent.service")["StartLimitBurst"][0])
    assert starts > MAX_CUT_WORK + MAX_ABNORMAL_EXITS + 1


def test_a_build_that_runs_out_of_memory_does_not_end_the_service():
    """By systemd's default one killed child stops the whole unit."""
    assert directives("remora-agent.service")["OOMPolicy"] == ["continue"]


def exposure(name: str) -> float:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(UNITS / name)],
        capture_output=True,
        text=True,
        check=True,
    )
    match = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert match is not None, done.stdout
    return float(match[1])


@needs_systemd
@pytest.mark.parametrize("name", ["remora-agent.service", "remora-controller.service"])
def test_the_sandbox_is_as_tight_as_the_docs_say(name):
    documented = re.search(rf"`{name}` \| ([\d.]+)", DOCS.read_text())
    assert documented is not None, f"docs/agent.md does not give the score of {name}"
    assert exposure(name) <= float(documented[1])


@pytest.mark.parametrize("name", ["remora-agent.service", "remora-controller.service"])
def test_units_restart_within_limits_and_are_watched(name):
    unit = directives(name)
    assert unit["Type"] == ["notify"]
    assert unit["Restart"] == ["on-failure"]
    assert int(unit["WatchdogSec"][0]) > 0
    assert int(unit["StartLimitBurst"][0]) > 0
    assert unit["ProtectSystem"] == ["strict"]
    assert unit["NoNewPrivileges"] == unit["PrivateTmp"] == ["yes"]


def test_the_agent_keeps_its_gpu():
    unit = directives("remora-agent.service")
    assert "PrivateDevices" not in unit
    assert "MemoryDenyWriteExecute" not in unit
    assert any("nvidia" in d for d in unit["DeviceAllow"])


def test_units_start_commands_that_exist():
    from remora_agent.cli import build_app as agent_app

    words = directives("remora-agent.service")["ExecStart"][0].split()
    names = {c.name or c.callback.__name__ for c in agent_app().registered_commands}
    assert words[1] in names
    assert Path(words[3]).name == "agent.toml"


def test_the_example_configuration_is_the_unit_s_and_parses():
    config = load_config(UNITS / "agent.toml")
    unit = directives("remora-agent.service")
    assert config.state_dir == f"/var/lib/{unit['StateDirectory'][0]}"


def test_users_of_the_units_are_declared():
    users = (UNITS / "remora.sysusers").read_text()
    for name in ("remora-agent", "remora-controller"):
        assert directives(f"{name}.service")["User"] == [name]
        assert re.search(rf"^u +{name} ", users, re.M)


def test_the_agent_tells_systemd_ready_watchdog_and_stopping(tmp_path):
    fleet = Fleet(tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(20)
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.support.agent_process",
                str(fleet.config),
                str(fleet.hold),
            ],
            cwd=ROOT,
            env={"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"},
            stderr=subprocess.DEVNULL,
        )
        fleet.processes.append(process)
        try:
            heard = [notify.recv(100) for _ in range(6)]
            assert b"READY=1" in heard
            assert heard.count(b"WATCHDOG=1") >= 3
            process.send_signal(signal.SIGTERM)
            while notify.recv(100) != b"STOPPING=1":
                pass
            assert process.wait(20) == 0
        finally:
            fleet.close()
