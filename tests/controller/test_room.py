"""Plans know what lies on a device's disk and what its memory can hold."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from remora_contract.held import Held
from remora_contract.memory_need import FACT, TENSORRT_FACT
from remora_contract.release import Constraints
from remora_contract.trt_memory import TrtSizes
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


GPU_SIZES = TrtSizes(
    weights=1 << 30,
    context=64,
    layers=1,
    vocab=100,
    hidden=100,
    bank_rank=8,
    cache_token=1 << 20,
    bank=5 << 20,
    longest_factor=0,
    row_vectors=0,
    neutral_vector=0,
    gates=0,
    row_gates=0,
)
# Four rows' cache, one row's logits and states a token: docs/tensorrt.md.
OF_GPU = (1 << 30) + (4 * 64 << 20) + (5 << 20) + 4 * 4 * 100 + 64 * 2 * 400 + (512 << 20)


def on_gpu(root, memory: int, backend: str = "tensorrt", is_shared: bool = False, **facts: object):
    sizes = {FACT: SIZES, TENSORRT_FACT: asdict(GPU_SIZES)}
    big = artifacts.publish(root, "bundle", "big", "1", [b"x"], context=64, **sizes)
    told = {
        "engine_rows": 4,
        "engine_key": {"backend": backend},
        "gpu_memory_bytes": memory,
        "gpu_shares_memory": is_shared,
    }
    return device(**{**told, **facts}), contents({big.digest: big}, big), big


def planned_peak(known, wanted) -> int | None:
    return make_plan([known], frozenset(), wanted, {}, ()).devices[0].peak_memory_bytes


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx"])
def test_a_gpu_that_does_not_hold_all_rows_and_the_least_workspace_is_refused(tmp_path, backend):
    least = OF_GPU + (128 << 20)
    small, wanted, big = on_gpu(tmp_path, least - 1, backend)
    (refusal,) = device_refusals(small, wanted)
    assert refusal.code == "memory"
    assert "rows 3 instead of 4" in refusal.need, "fewer rows would be built: it is said"
    assert planned_peak(small, wanted) == least
    enough, _, _ = on_gpu(tmp_path, least, backend)
    assert device_refusals(enough, wanted) == []
    serving = replace(small, report=replace(small.report, bundle_digest=big.digest))
    assert device_refusals(serving, wanted) == []


def test_the_peak_has_the_workspace_that_the_builder_is_given_where_that_is_known(tmp_path):
    known, wanted, _ = on_gpu(tmp_path, OF_GPU + (1 << 30))
    assert planned_peak(known, wanted) == OF_GPU + (1 << 29)
    portable, _, _ = on_gpu(tmp_path, OF_GPU + (1 << 30), "tensorrt_rtx")
    assert planned_peak(portable, wanted) == OF_GPU + (128 << 20)


def test_pinned_memory_counts_where_it_is_the_gpus(tmp_path):
    of_its_own, wanted, _ = on_gpu(tmp_path, 64 << 30)
    shared, _, _ = on_gpu(tmp_path, 64 << 30, is_shared=True)
    pinned = GPU_SIZES.pinned_bytes(4, 64)
    assert planned_peak(shared, wanted) == planned_peak(of_its_own, wanted) + pinned


def test_an_older_agent_and_edgellm_do_not_say_what_of_a_gpu_is_taken(tmp_path):
    for silent, wanted, _ in (
        on_gpu(tmp_path, 0),
        on_gpu(tmp_path, 1, engine_rows=0),
        on_gpu(tmp_path, 1, "edgellm"),
    ):
        assert device_refusals(silent, wanted) == []
        assert planned_peak(silent, wanted) is None


def test_a_gpu_does_not_change_what_onnx_runtime_takes(tmp_path):
    known, wanted, _ = on_gpu(tmp_path, 1, "onnxruntime", memory_floor_bytes=350)
    assert device_refusals(known, wanted) == []
    assert planned_peak(known, wanted) == 1000 + 500 + 4 * 10 * 65 + 350


@pytest.mark.parametrize(
    "facts",
    [
        {"engine_rows": 0},
        {"engine_rows": (1 << 32) - 1},
        {"engine_key": {"backend": "tensorrt"}},
        {"memory_bytes": 0},
    ],
)
def test_an_agent_that_does_not_say_is_not_refused_for_memory(tmp_path, facts):
    silent, wanted, _ = sized(tmp_path, 1, **facts)
    assert device_refusals(silent, wanted) == []
