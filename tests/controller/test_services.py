"""Real servers, real mTLS, real stubs."""

from __future__ import annotations

import pytest

from remora_contract.digests import canonical_json
from remora_protos.operator.v1 import operator_pb2 as op
from tests.controller import artifacts
from tests.controller.harness import WAIT_S, Fleet, fleet, make_home


@pytest.fixture
def home(tmp_path):
    return make_home(tmp_path / "controller")


@pytest.fixture
def world(home):
    with fleet(home) as made:
        yield made


def create_release(world: Fleet, name: str = "first") -> str:
    bundle = artifacts.bundle(world.home.repository)
    release = artifacts.release(name, bundle, artifacts.adapter(world.home.repository))
    request = op.CreateReleaseRequest(release_json=canonical_json(release))
    return world.operator.CreateRelease(request, timeout=WAIT_S).release_id


def start(world: Fleet, release: str, **more: object) -> str:
    request = op.StartRolloutRequest(release=release, **more)
    return world.operator.StartRollout(request, timeout=WAIT_S).rollout_id


def test_a_release_reaches_every_device_wave_by_wave(world):
    devices = [world.device(site="berlin") for _ in range(3)]
    for device in devices:
        device.sync()
    rollout_id = start(world, create_release(world))
    done = world.drive(rollout_id, devices, "COMPLETED", "ROLLED_BACK")
    assert done.state == "COMPLETED"
    assert {d.outcome for d in done.devices} == {"succeeded"}
    assert [d.wave for d in done.devices] == [1, 2, 2]
    assert all(d.running == done.release_id for d in devices)
