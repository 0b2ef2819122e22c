"""An abort that reverts reaches a device in every phase it can be in: the last good release serves
on, and nothing more is done for the one that was dropped, also over a power cut."""

from __future__ import annotations

import pytest

from remora_contract.device_phase import FINAL, Phase
from tests.agent.control.device import Device
from tests.support.repository import Repository, make_release

# The phases that a step can begin in; an abort during SWITCHING is below.
ABORTED_IN = [p for p in Phase if p not in FINAL and p not in (Phase.SWITCHING, Phase.REVERTING)]


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path / "repository")


@pytest.fixture
def device(tmp_path, repository):
    made = Device(tmp_path / "state", repository.root)
    yield made
    made.database.close()


@pytest.fixture
def good(repository):
    return make_release("good", repository.bundle(1, 120_000), repository.adapter(11))


@pytest.fixture
def dropped(repository):
    return make_release("dropped", repository.bundle(2, 120_000), repository.adapter(12))


def test_every_phase_is_tried():
    assert {p.value for p in ABORTED_IN} == {
        *("ASSIGNED", "ADMITTED", "STAGING", "STAGED", "BUILDING", "BUILT", "PROVING"),
        *("WAIT_WINDOW", "SOAKING"),
    }


@pytest.mark.parametrize("is_cut", [False, True], ids=["", "power cut after the abort"])
@pytest.mark.parametrize("phase", ABORTED_IN)
def test_an_abort_takes_the_device_back_and_ends_all_work_for_the_dropped_release(
    device, good, dropped, phase, is_cut
):
    _commit(device, good)
    device.assign(dropped, soak_s=3600.0)
    device.settle(until=phase)
    calls = len(device.host.calls)
    assert device.assign(good), "an abort is taken at once here"
    if is_cut:
        device.crash()
        device.boot(kernel_boot_id="k2")
        calls = 0
    record = device.settle()
    assert (record.phase, record.committed) == (Phase.COMMITTED, good.release_id)
    assert device.running == good.release_id
    after = [c[1] for c in device.host.calls[calls:]]
    assert dropped.release_id not in after, device.host.calls
    assert not device.layout.artifact(dropped.bundle).exists(), "it keeps its room on the disk"


def test_an_abort_that_arrives_in_the_switch_waits_for_its_end_and_then_goes_back(
    device, good, dropped
):
    _commit(device, good)
    taken = []
    device.host.hooks["switch"] = lambda assignment, progress: taken.append(device.assign(good))
    device.assign(dropped, soak_s=3600.0)
    device.settle(until=Phase.SOAKING)
    del device.host.hooks["switch"]
    assert (taken, device.running) == ([False], dropped.release_id)
    assert device.assign(good), "the next Sync offers it again"
    assert device.settle().phase is Phase.COMMITTED
    assert device.running == good.release_id


def _commit(device, release):
    device.assign(release)
    assert device.settle().phase is Phase.COMMITTED
