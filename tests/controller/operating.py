"""What an operator does in tests of the whole controller, and the devices that are there."""

from __future__ import annotations

import grpc
import pytest

from remora_contract import errors
from remora_contract.digests import canonical_json
from remora_contract.rpc import from_rpc_error
from remora_protos.operator.v1 import operator_pb2 as op
from tests.controller import artifacts
from tests.controller.harness import WAIT_S, Fleet


def create_release(world: Fleet, name: str = "first", revision: str = "1") -> str:
    bundle = artifacts.bundle(world.home.repository)
    adapter = artifacts.adapter(world.home.repository, revision=revision)
    document = canonical_json(artifacts.release(name, bundle, adapter))
    request = op.CreateReleaseRequest(release_json=document)
    return world.operator.CreateRelease(request, timeout=WAIT_S).release_id


def start(world: Fleet, release: str, **more: object) -> str:
    request = op.StartRolloutRequest(release=release, **more)
    return world.operator.StartRollout(request, timeout=WAIT_S).rollout_id


def refused(call, *arguments, **named) -> errors.RemoraError:
    with pytest.raises(grpc.RpcError) as e:
        call(*arguments, **named, timeout=WAIT_S)
    return from_rpc_error(e.value)


def online(world: Fleet, count: int, **labels: str):
    devices = [world.device(**labels) for _ in range(count)]
    for device in devices:
        device.sync()
    return devices


def devices_by_id(world: Fleet) -> dict[str, op.Device]:
    found = world.operator.ListDevices(op.ListDevicesRequest(), timeout=WAIT_S).devices
    return {d.device_id: d for d in found}
