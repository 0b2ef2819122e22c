"""Power cuts: processes end at the worst moment and the fleet arrives all the same."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from examples.demo.fleet import agent_toml
from examples.demo.processes import await_value
from tests.end_to_end.holding import BUILD_CHILD, stopped_child

pytestmark = pytest.mark.slow

SLOW = 150_000  # bytes per second: the bundle takes some seconds


def test_an_agent_killed_while_it_downloads_resumes_where_it_was(stage):
    # Slow enough that the larger part is still to come however late the kill is.
    (agent,) = stage.join("one", download_bytes_per_s=SLOW // 3)
    stage.release("all", stage.artifacts.bundle.reference, "alpha", "beta-1")
    rollout = stage.start("all")
    quarter = stage.artifacts.bundle.bytes // 4
    await_value(lambda: _held(agent) > quarter, "a quarter of the download", 60.0, stage.shop)
    agent.daemon.kill()
    held = _held(agent)
    agent.config.write_text(agent_toml(agent.state, ["name=one"]))
    stage.fleet.restart(agent)
    assert stage.ended(rollout)["state"] == "COMPLETED"
    digest = stage.artifacts.bundle.digest
    (fetched,) = [e for e in agent.events("artifact.fetched") if e["digest"] == digest]
    assert fetched["bytes"] <= _published_bytes(stage) - held
    stage.ask(agent, stage.artifacts.cast.variants(1))


def test_an_agent_killed_while_it_builds_builds_again(stage):
    (agent,) = stage.join("one")
    stage.release("all", stage.artifacts.bundle.reference, "alpha", "beta-1")
    with stopped_child(BUILD_CHILD, agent) as build:
        rollout = stage.start("all")
        builder = build()
        agent.daemon.kill()
    await_value(lambda: not _alive(builder), "the end of the orphaned build", 60.0)
    stage.fleet.restart(agent)
    assert stage.ended(rollout)["state"] == "COMPLETED"
    stage.ask(agent, stage.artifacts.cast.variants(1))


def test_a_first_release_that_takes_the_agent_down_makes_room_for_a_better_one(stage):
    (agent,) = stage.join("one")
    stage.release("fatal", stage.artifacts.bundle.reference, "alpha")
    stage.roll_out("fatal")
    for _ in range(3):
        _await_health(agent, health_pb2.HealthCheckResponse.SERVING)
        agent.daemon.kill()
        stage.fleet.restart(agent)
    await_value(lambda: _device(stage)["phase"] == "FAILED", "FAILED", 60.0, stage.shop)
    device = _device(stage)
    assert (device["error_code"], device["running_release_id"]) == ("AbnormalExits", "")
    assert "agent.started" in device["error_message"], "the log's last lines of the run before"
    _await_health(agent, health_pb2.HealthCheckResponse.NOT_SERVING)
    stage.release("better", stage.artifacts.bundle.reference, "alpha", "beta-1")
    stage.roll_out("better")
    stage.ask(agent, stage.artifacts.cast.variants(1))


def test_a_rollout_outlives_its_controller(stage):
    agents = stage.join("one", "two", download_bytes_per_s=SLOW)
    stage.release("all", stage.artifacts.bundle.reference, "alpha", "beta-1")
    rollout = stage.start("all", "--wave", "1")
    await_value(lambda: any(map(_held, agents)), "the first bytes", 60.0, stage.shop)
    assert stage.fleet.controller is not None
    stage.fleet.controller.kill()
    stage.fleet.serve()
    assert stage.ended(rollout)["state"] == "COMPLETED"
    assert stage.running() == {"all"}
    for agent in agents:
        stage.ask(agent, stage.artifacts.cast.variants(1))


def _published_bytes(stage):
    """Of the bundle with its own document."""
    artifacts = stage.fleet.operator("bundles")
    return next(a["bytes"] for a in artifacts if a["digest"] == stage.artifacts.bundle.digest)


def _device(stage):
    (device,) = stage.fleet.operator("devices", "list")
    return device


def _await_health(agent, state):
    with grpc.insecure_channel(agent.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        request = health_pb2.HealthCheckRequest()
        await_value(lambda: check(request).status == state, f"health {state}", 60.0)


def _held(agent):
    """Bytes of chunks on the device, whole or in part."""
    held = 0
    for directory, _, names in os.walk(agent.state / "cas"):  # passes over what goes meanwhile
        for name in names:
            with suppress(FileNotFoundError):
                held += Path(directory, name).stat().st_size
    return held


def _alive(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
