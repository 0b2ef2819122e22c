"""The real commands together: controller, operator, one agent with the real serving host."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

import pytest

from remora_agent.client import Client
from remora_build.publish.publisher import publish
from remora_build.publish.store import LocalStore

T = TypeVar("T")
BIN = Path(sys.executable).parent
AGENT_TOML = """
state_dir = "{state}"
[labels]
site = "lab"
[serving]
listen = "127.0.0.1:0"
rows = 2
threads = 1
drain_s = 5.0
[telemetry]
interval_s = 0.5
metrics_listen = ""
[limits]
disk_floor_bytes = 0
"""


class RealFleet:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = dict(os.environ)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.store = LocalStore(folder / "repository")
        self.remora_controller("init", "home", "--address", "127.0.0.1")
        config = folder / "home" / "controller.toml"
        config.write_text(
            config.read_text()
            .replace("sync_interval_s = 10.0", "sync_interval_s = 0.5")
            .replace("offline_after_s = 45.0", "offline_after_s = 3.0")
        )
        self.ports = {"fleet": "127.0.0.1:0", "enrolment": "127.0.0.1:0"}
        self.environment["REMORA_CREDENTIALS"] = str(folder / "home" / "operator")
        self.start_controller()
        (folder / "agent.toml").write_text(AGENT_TOML.format(state=folder / "state"))

    def run(self, *argv: str, **environment: str) -> str:
        done = subprocess.run(
            [str(BIN / argv[0]), *argv[1:]],
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def remora_controller(self, *argv: str) -> str:
        return self.run("remora-controller", *argv)

    def start(self, name: str, *argv: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(BIN / argv[0]), *argv[1:]], cwd=self.folder, env=self.environment, stderr=log
            )
        self.processes.append(process)
        return process

    def start_controller(self) -> subprocess.Popen[bytes]:
        listening = self.folder / "home" / "listening.json"
        listening.unlink(missing_ok=True)
        process = self.start(
            *("controller", "remora-controller", "serve", "home"),
            *("--repository", str(self.folder / "repository"), "--metrics-listen", "127.0.0.1:0"),
            *("--listen", self.ports["fleet"], "--enrol-listen", self.ports["enrolment"]),
        )
        found = until(lambda: listening.exists() and json.loads(listening.read_text() or "null"))
        self.ports = {k: f"127.0.0.1:{str(v).rpartition(':')[2]}" for k, v in found.items()}
        self.environment["REMORA_CONTROLLER"] = self.ports["fleet"]
        return process

    def join(self) -> None:
        token = self.run("remora", "devices", "token").strip()
        self.run(
            *("remora-agent", "join", self.ports["enrolment"], "--state-dir", "state"),
            REMORA_JOIN_TOKEN=token,
        )

    def start_agent(self) -> subprocess.Popen[bytes]:
        (self.folder / "agent.log").write_bytes(b"")
        return self.start("agent", "remora-agent", "run", "--config", "agent.toml")

    def address(self) -> str:
        return until(lambda: self.logged("serving.listening"))[-1]["address"]

    def logged(self, event: str) -> list[dict[str, str]]:
        lines = (self.folder / "agent.log").read_text().splitlines()
        found = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return [line for line in found if line.get("event") == event]

    def device(self) -> dict[str, str]:
        return json.loads(self.run("remora", "devices", "list", "--json"))[0]

    def roll_out(self, release: str, **wanted: str) -> None:
        self.run("remora", "rollout", "start", release, "--soak", "0")
        until(lambda: self.device()["running_release_id"].startswith(f"{release}-"), self.story)
        until(lambda: self.device()["phase"] == "COMMITTED", self.story)

    def story(self) -> str:
        return (self.folder / "agent.log").read_text()[-5000:] + json.dumps(self.device())

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def until(condition: Callable[[], T], story: Callable[[], str] = str, timeout_s: float = 60.0) -> T:
    limit = time.monotonic() + timeout_s
    while not (answer := condition()):
        assert time.monotonic() < limit, story()
        time.sleep(0.1)
    return answer


@pytest.fixture
def fleet(tmp_path):
    made = RealFleet(tmp_path)
    yield made
    made.close()


def put(fleet: RealFleet, directory: Path, name: str, revision: str) -> str:
    now = datetime.now(timezone.utc)
    return publish(directory, fleet.store, name=name, revision=revision, now=now).digest


def answering(client: Client, adapter: str) -> str:
    """The digest of the adapter that answered."""
    result = client.generate([5, 6, 7], max_tokens=4, adapter=adapter)
    return result.provenance.adapters[0].digest


@pytest.mark.slow
def test_a_release_and_a_new_adapter_revision_reach_a_real_agent(fleet, real_bundles):
    put(fleet, real_bundles.plain, "base", "r1")
    first = put(fleet, real_bundles.adapter_dir("a", "r1"), "style", "r1")
    second = put(fleet, real_bundles.adapter_dir("a", "r2"), "style", "r2")
    fleet.join()
    agent = fleet.start_agent()
    create = ("remora", "releases", "create", "--bundle", "base@r1")
    fleet.run(*create, "--name", "one", "--adapter", "style=style@r1")
    fleet.run(*create, "--name", "two", "--adapter", "style=style@r2")

    fleet.roll_out("one")
    with Client(fleet.address()) as client:
        assert answering(client, "style") == first
        fetched = len(fleet.logged("artifact.fetched"))
        fleet.roll_out("two")
        assert answering(client, "style") == second
    assert len(fleet.logged("artifact.fetched")) == fetched + 1, "only the adapter was shipped"

    top = json.loads(fleet.run("remora", "top", "--json", "--once"))
    assert "cpu_load" in json.dumps(top)

    # Both die at once; the agent comes up alone and serves what was committed.
    for process in fleet.processes:
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    agent = fleet.start_agent()
    with Client(fleet.address(), timeout_s=30) as client:
        until(lambda: fleet.logged("release.switched"))
        assert answering(client, "style") == second
        fleet.start_controller()
        until(lambda: fleet.device()["status"] == "online", fleet.story)
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(30) == 0


@pytest.mark.slow
def test_log_and_checks_of_a_real_agent_come_to_the_operator(fleet):
    fleet.join()
    fleet.start_agent()
    until(lambda: fleet.device()["status"] == "online", fleet.story)
    device_id = fleet.device()["device_id"]
    lines = fleet.run("remora", "logs", "fetch", device_id).splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert "agent.started" in events
    checks = subprocess.run(
        [str(BIN / "remora"), "devices", "doctor", device_id, "--json"],
        env=fleet.environment,
        capture_output=True,
        text=True,
        timeout=150,
    )
    by_name = {c["name"]: c for c in json.loads(checks.stdout)}
    assert by_name["controller"]["verdict"] == "ok", checks.stdout
    assert checks.returncode == int(any(c["verdict"] == "fail" for c in by_name.values()))
