"""Plans know what lies on a device's disk and what its memory can hold."""

from __future__ import annotations

from dataclasses import replace

import pytest

from remora_contract.held import Held
from remora_contract.memory_need import FACT
from remora_contract.release import Constraints
from remora_controller.planner import (
    device_refusals,
    engine_plan,
    make_plan,
    peak_disk_bytes,
    ship_bytes,
)
from tests.controller import artifacts
from tests.controller.test_planner import contents, device

SIZES = {"weights": 1000, "int8_prefill": 0, "kv_token": 10, "bank": 500, "row_slot": 0}


@pytest.fixture
def things(tmp_path):
    serving = artifacts.bundle(tmp_path)
    earlier = artifacts.bundle(tmp_path, revision="2")
    manifests = {m.digest: m for m in (serving, earlier)}
    return serving, earlier, manifests


def holding(serving, free: int = 1 << 30, **held: tuple[str, ...]):
    return replace(device("d1", serving.digest, disk_free_bytes=free), held=Held(**held))


def test_the_release_before_this_one_ships_and_builds_nothing(things):
    serving, earlier, manifests = things
    wanted = contents(manifests, earlier)
    back = holding(serving, kept=(earlier.digest,), built=(earlier.digest,))
    assert (ship_bytes(back, wanted), peak_disk_bytes(back, wanted)) == (0, 0)
    assert engine_plan(back, wanted).what == "kept"
    assert device_refusals(holding(serving, 1, kept=(earlier.digest,)), wanted) == [], (
        "nothing has to be fetched, so there is no disk to be short of"
    )


def test_a_bundle_that_is_there_without_its_engine_is_built(things):
    serving, earlier, manifests = things
    assert engine_plan(
        holding(serving, kept=(earlier.digest,)), contents(manifests, earlier)
    ).what == ("built")


def test_what_the_device_can_drop_counts_as_free_where_it_is_short(things):
    serving, earlier, manifests = things
    wanted = contents({**manifests, serving.digest: serving}, earlier)
    need = peak_disk_bytes(holding(serving), wanted)
    other = replace(earlier, digest="sha256:" + "7" * 64)
    wanted = contents({**manifests, other.digest: other}, earlier)
    short = holding(serving, need - 1)
    assert [r.code for r in device_refusals(short, wanted)] == ["disk"]
    assert device_refusals(holding(serving, need - 1, loose=(other.digest,)), wanted) == []
    assert [
        r.code for r in device_refusals(holding(serving, need - 1, kept=(other.digest,)), wanted)
    ] == ["disk"], "what stays frees nothing"


def test_chunks_of_what_it_drops_are_fetched_and_of_what_it_can_leave_are_not(things):
    serving, earlier, manifests = things
    wanted = contents(manifests, earlier)
    empty = replace(device(), held=Held(loose=(serving.digest,)))
    shared = ship_bytes(empty, wanted)
    assert 0 < shared < earlier.bytes
    short = replace(empty, facts=replace(empty.facts, disk_free_bytes=earlier.bytes))
    assert ship_bytes(short, wanted) == earlier.bytes


def test_the_devices_floor_is_kept_as_the_device_keeps_it(things):
    serving, earlier, manifests = things
    wanted = contents(manifests, earlier)
    need = peak_disk_bytes(holding(serving), wanted)
    floored = holding(serving, need + 99)
    floored = replace(floored, facts=replace(floored.facts, disk_floor_bytes=100))
    assert [r.code for r in device_refusals(floored, wanted)] == ["disk"]
    roomy = replace(floored, facts=replace(floored.facts, disk_free_bytes=need + 100))
    assert device_refusals(roomy, wanted) == []


def test_a_constraint_on_disk_counts_what_can_be_dropped_too(things):
    serving, earlier, manifests = things
    limits = Constraints(min_disk_free_bytes=(1 << 20))
    other = replace(earlier, digest="sha256:" + "7" * 64, files=serving.files)
    wanted = contents({**manifests, other.digest: other}, earlier, constraints=limits)
    just = (1 << 20) - other.bytes
    assert device_refusals(holding(serving, just, loose=(other.digest,)), wanted) == []
    assert [r.code for r in device_refusals(holding(serving, just), wanted)] == ["disk"]


def sized(root, memory: int, **facts: object):
    big = artifacts.publish(root, "bundle", "big", "1", [b"x"], context=64, **{FACT: SIZES})
    told = {
        "engine_rows": 4,
        "memory_floor_bytes": 350,
        "memory_bytes": memory,
        "engine_key": {"backend": "onnxruntime", "prefill": "plain"},
    }
    return device(**{**told, **facts}), contents({big.digest: big}, big), big


def test_a_device_that_could_not_hold_one_row_is_refused_and_one_that_could_is_not(tmp_path):
    least = 1000 + 10 * 65 + 350
    small, wanted, _ = sized(tmp_path, least - 1)
    (refusal,) = device_refusals(small, wanted)
    assert (refusal.code, refusal.have) == ("memory", "1 MiB")
    assert "floor" in refusal.need
    enough, wanted, _ = sized(tmp_path, least)
    assert device_refusals(enough, wanted) == []
    (plan,) = make_plan([enough], frozenset(), wanted, {}, ()).devices
    assert plan.peak_memory_bytes == 1000 + 500 + 4 * 10 * 65 + 350


def test_a_bundle_that_serves_fits_whatever_is_reckoned(tmp_path):
    small, wanted, big = sized(tmp_path, 1)
    serving = replace(small, report=replace(small.report, bundle_digest=big.digest))
    assert device_refusals(serving, wanted) == []


def test_a_smaller_context_of_the_device_is_reckoned_with(tmp_path):
    least = 1000 + 10 * 33 + 350
    small, wanted, _ = sized(tmp_path, least, engine_context=32)
    assert device_refusals(small, wanted) == []


@pytest.mark.parametrize(
    "facts", [{"engine_rows": 0}, {"engine_key": {"backend": "tensorrt"}}, {"memory_bytes": 0}]
)
def test_an_agent_that_does_not_say_is_not_refused_for_memory(tmp_path, facts):
    silent, wanted, _ = sized(tmp_path, 1, **facts)
    assert device_refusals(silent, wanted) == []
