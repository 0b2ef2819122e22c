"""SIGKILL for real: during the download, the build and the switch. A second process picks up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from remora_agent.control.join import JoinPlan, join
from remora_agent.control.layout import StateLayout
from tests.support.fake_controller import FakeController
from tests.support.repository import Repository, make_release

ROOT = Path(__file__).parents[3]
SLACK = 256 * 1024


class Fleet:
    """A controller, one joined device and its processes."""

    def __init__(self, folder: Path) -> None:
        self.repository = Repository(folder / "repository")
        self.controller = FakeController(self.repository.root).start()
        self.layout = StateLayout(folder / "state")
        self.layout.create()
        self.hold = folder / "hold"
        self.hold.mkdir()
        self.config = folder / "agent.toml"
        self.config.write_text(
            f'state_dir = "{self.layout.root}"\n'
            '[telemetry]\nmetrics_listen = ""\n[limits]\ndisk_floor_bytes = 0\n'
        )
        c = self.controller
        join(JoinPlan(c.enrolment_address, c.token, self.layout.identity, {}))
        self.processes: list[subprocess.Popen[bytes]] = []

    def start_agent(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.support.agent_process",
                str(self.config),
                str(self.hold),
            ],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )
        self.processes.append(process)
        return process

    def commit_first(self):
        release = make_release("first", self.repository.bundle(1, 50_000))
        self.controller.assign(release)
        self.controller.wait_phase("COMMITTED", timeout_s=60)
        return release

    def held(self) -> int:
        """Bytes of chunks on the device's disk."""
        files = (Path(folder, n) for folder, _, names in os.walk(self.layout.cas) for n in names)
        held = 0
        for path in files:
            with suppress(FileNotFoundError):  # it is whole meanwhile and has its name
                held += path.stat().st_size
        return held

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.controller.stop()


@pytest.fixture
def fleet(tmp_path):
    made = Fleet(tmp_path)
    yield made
    made.close()


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL


def wait_for(path: Path) -> None:
    until(path.exists, f"{path}")


def until(true: Callable[[], bool], what: str) -> None:
    limit = time.monotonic() + 60
    while not true():
        assert time.monotonic() < limit, f"never: {what}"
        time.sleep(0.01)


def test_killed_during_the_download_resumes_where_the_bytes_stopped(fleet):
    fleet.start_agent()
    first = fleet.commit_first()
    c, manifest = fleet.controller, fleet.repository.bundle(2, 900_000)
    before, half_way, go_on = c.sent_bytes, threading.Event(), threading.Event()

    def stall(chunk: str, offset: int) -> None:
        if c.sent_bytes - before > 450_000 and not go_on.is_set():
            half_way.set()
            go_on.wait(120)

    c.faults.wait_before_piece = stall
    release = make_release("second", manifest)
    c.assign(release)
    assert half_way.wait(60)
    c.wait_phase("STAGING")
    # What was sent may wait in buffers for as long as the agent gets no processor.
    until(lambda: fleet.held() > c.sent_bytes - before - SLACK, "the agent wrote what was sent")
    kill(fleet.processes[-1])
    sent_before_kill = c.sent_bytes - before
    go_on.set()
    c.faults.wait_before_piece = None
    count = len(c.syncs)
    fleet.start_agent()
    state = c.wait_phase("COMMITTED", timeout_s=60)
    assert state.running_release_id == release.release_id
    # Nothing was fetched twice but what was still in buffers when the process died.
    assert c.sent_bytes - before <= manifest.bytes + SLACK
    assert sent_before_kill > 400_000
    restarted = c.syncs[count].reported
    assert restarted.running_release_id in (first.release_id, ""), "nothing unproven serves"


def test_killed_during_the_build_builds_again_and_commits(fleet):
    fleet.start_agent()
    first = fleet.commit_first()
    second = make_release("second", fleet.repository.bundle(2, 50_000))
    (fleet.hold / "build").write_text(second.release_id)
    fleet.controller.assign(second)
    wait_for(fleet.hold / "build.reached")
    assert fleet.controller.wait_phase("BUILDING").running_release_id == first.release_id
    kill(fleet.processes[-1])
    (fleet.hold / "build").unlink()
    fleet.start_agent()
    assert fleet.controller.wait_phase("COMMITTED", timeout_s=60).running_release_id == (
        second.release_id
    )


def test_killed_during_the_switch_goes_back_to_what_served(fleet):
    fleet.start_agent()
    first = fleet.commit_first()
    second = make_release("second", fleet.repository.bundle(2, 50_000))
    (fleet.hold / "switch").write_text(second.release_id)
    fleet.controller.assign(second)
    wait_for(fleet.hold / "switch.reached")
    kill(fleet.processes[-1])
    fleet.start_agent()
    state = fleet.controller.wait_phase("REVERTED", timeout_s=60)
    assert state.running_release_id == first.release_id
    assert state.error_code == "Interrupted"
    assert str(fleet.layout.current.readlink()) == f"releases/{first.release_id}.json"


def test_sigterm_during_a_build_ends_cleanly_and_resumes(fleet):
    process = fleet.start_agent()
    first = fleet.commit_first()
    second = make_release("second", fleet.repository.bundle(2, 50_000))
    (fleet.hold / "build").write_text(second.release_id)
    fleet.controller.assign(second)
    wait_for(fleet.hold / "build.reached")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    (fleet.hold / "build").unlink()
    fleet.start_agent()
    state = fleet.controller.wait_phase("COMMITTED", timeout_s=60)
    assert state.running_release_id == second.release_id != first.release_id
