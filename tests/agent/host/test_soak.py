"""A release whose engine fails while it soaks goes back: the reconciler over the host that serves.

The engine is the reference one, everything between its fault and the decision is the product's.
"""

from __future__ import annotations

import random

import pytest

from remora_agent.control.activation import Desired
from remora_agent.control.effects import Effects
from remora_agent.control.interrupt import Interrupt
from remora_agent.control.layout import StateLayout
from remora_agent.control.reconcile import Reconciler
from remora_agent.control.state import Database, DeviceState
from remora_contract.device_phase import Phase
from remora_contract.digests import canonical_json, hex_of
from remora_contract.errors import EngineFault
from remora_contract.release import Release

OPTIONS = {"max_tokens": 6, "ignore_eos": True}


class NothingToFetch:
    """The test puts the artifacts in place."""

    def cap(self, bytes_per_s, is_shared=False):
        pass

    def stage(self, wanted, progress):
        return []


class Device:
    def __init__(self, root, hosted) -> None:
        self.hosted, self.clock, self.generation = hosted, [1000.0], 0
        self.layout = StateLayout(root)
        self.layout.create()
        self.database = Database(self.layout.database)
        effects = Effects(self.layout, hosted.host, NothingToFetch(), lambda name, detail: None)
        self.reconciler = Reconciler(
            *(DeviceState(self.database), effects, Interrupt()),
            *(lambda: self.clock[0], random.Random(1).random),
        )
        self.reconciler.start("boot")

    def assign(self, name: str, soak_s: float) -> str:
        bundle = self.hosted.world.bundle(name)
        target = self.layout.artifacts / hex_of(bundle.digest)
        target.symlink_to(self.hosted.world.root / "b" / name)
        release = Release(format_version=1, name=name, bundle=bundle.digest)
        self.generation += 1
        document = canonical_json(release).decode()
        desired = Desired(self.generation, release.release_id, document, "r", soak_s, False)
        assert self.reconciler.assign(desired)
        return release.release_id

    def settle(self, *until: Phase):
        for _ in range(200):
            record = self.reconciler.report().record
            if record.phase in until:
                return record
            self.clock[0] += self.reconciler.step()
        raise AssertionError(record)

    @property
    def running(self) -> str:
        return self.hosted.host.serving().release_id


@pytest.fixture
def device(tmp_path, hosted):
    made = Device(tmp_path / "state", hosted)
    yield made
    made.database.close()


def test_a_release_whose_engine_fails_while_soaking_goes_back_by_itself(device, hosted):
    good = device.assign("base", soak_s=0.0)
    device.settle(Phase.COMMITTED)
    bad = device.assign("second", soak_s=3600.0)
    device.settle(Phase.SOAKING)
    assert device.running == bad
    for number in range(3):
        hosted.engines.opened[-1].faults.append(EngineFault(f"kernel {number} failed"))
        with pytest.raises(EngineFault):
            hosted.client.generate("x", **OPTIONS)
    record = device.settle(Phase.REVERTED, Phase.COMMITTED)
    assert (record.phase, record.error_code) == (Phase.REVERTED, "Unhealthy")
    assert "the engine failed 3 times" in record.error_message
    assert device.running == good
    assert hosted.client.generate("x", **OPTIONS).text is not None


def test_faults_of_the_release_before_do_not_count_against_the_one_that_soaks(device, hosted):
    device.assign("base", soak_s=0.0)
    device.settle(Phase.COMMITTED)
    for _ in range(4):
        hosted.engines.opened[-1].faults.append(EngineFault("worn out"))
        with pytest.raises(EngineFault):
            hosted.client.generate("x", **OPTIONS)
    better = device.assign("second", soak_s=60.0)
    assert device.settle(Phase.REVERTED, Phase.COMMITTED).phase is Phase.COMMITTED
    assert device.running == better
