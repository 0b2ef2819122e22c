"""What a release costs on the wire: real controller and agents (with a host that only says that it
serves), every byte between them counted, TLS and HTTP/2 included."""

from __future__ import annotations

import threading
from contextlib import contextmanager

from remora_agent.config import AgentConfig, ControllerConfig, LimitsConfig, TelemetryConfig
from remora_agent.control.agent import Agent
from remora_agent.control.compose import compose
from remora_agent.control.join import JoinPlan, join
from remora_contract.digests import canonical_json
from remora_contract.join_token import JoinToken
from remora_protos.operator.v1 import operator_pb2 as op
from tests.controller.harness import WAIT_S, Fleet, fleet, make_home, wait_for
from tests.support.counting_forwarder import counting
from tests.support.repository import Repository, make_release
from tests.support.scripted_host import ScriptedHost

DEVICES = 3
OVERHEAD = 64 << 10  # the goal: bytes a device beside the adapter itself, both ways
BUNDLE_BYTES, ADAPTER_BYTES = 3_000_000, 400_000


@contextmanager
def agents(world: Fleet, folder, address: str):
    """So many agents on their own threads; their controller is at `address`."""
    running = [_start(world, folder / f"device-{n}", address) for n in range(DEVICES)]
    try:
        yield
    finally:
        for agent, thread in running:
            agent.stop.set()
            thread.join(WAIT_S)


def _start(world: Fleet, folder, address: str) -> tuple[Agent, threading.Thread]:
    folder.mkdir(parents=True)
    plan = JoinPlan(
        f"127.0.0.1:{world.ports.enrolment}", JoinToken.decode(world.token()), folder / "i", {}
    )
    config = AgentConfig(
        state_dir=str(folder),
        controller=ControllerConfig(address=address),
        telemetry=TelemetryConfig(metrics_listen=""),
        limits=LimitsConfig(disk_floor_bytes=0),
    )
    agent = Agent(compose(config, join(plan), ScriptedHost()))
    thread = threading.Thread(target=agent.run, daemon=True)
    thread.start()
    return agent, thread


def online(world: Fleet) -> int:
    devices = world.operator.ListDevices(op.ListDevicesRequest(), timeout=WAIT_S).devices
    return sum(d.status == "online" for d in devices)


def complete(world: Fleet, release) -> None:
    request = op.CreateReleaseRequest(release_json=canonical_json(release))
    info = world.operator.CreateRelease(request, timeout=WAIT_S)
    spec = op.RolloutSpec(waves=[op.Wave(percent=100.0)])
    started = world.operator.StartRollout(
        op.StartRolloutRequest(release=info.release_id, spec=spec), timeout=WAIT_S
    )
    wait_for("completed", lambda: world.rollout(started.rollout_id).state == "COMPLETED")


def test_an_adapter_release_costs_a_device_the_adapter_and_little_else(tmp_path):
    home = make_home(tmp_path / "controller")
    repository = Repository(home.repository)
    with counting() as wire, fleet(home, sync_interval_s=5.0) as world:
        wire.target = world.ports.fleet
        with agents(world, tmp_path / "devices", f"127.0.0.1:{wire.port}"):
            wait_for("all are online", lambda: online(world) == DEVICES)
            bundle = repository.bundle(size=BUNDLE_BYTES)
            complete(world, make_release("base", bundle))
            assert wire.passed > DEVICES * BUNDLE_BYTES
            before = wire.passed
            adapter = repository.adapter(size=ADAPTER_BYTES)
            complete(world, make_release("adapter", bundle, adapter))
            passed = wire.passed - before
    size = sum(f.size for f in adapter.files)
    assert DEVICES * size < passed < DEVICES * (size + OVERHEAD)
