"""Plans: what ships, what is built, who cannot take it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from remora_contract.release import Constraints, SamplingDefaults
from remora_controller.domain import Device, Facts, Report, ServingAdapter, Wave
from remora_controller.planner import (
    Contents,
    device_refusals,
    make_plan,
    peak_disk_bytes,
    release_refusals,
    ship_bytes,
)
from tests.controller import artifacts

FACTS = Facts(
    hostname="h",
    agent_version="0.2.0",
    device_model="Orin",
    memory_bytes=8 << 30,
    disk_free_bytes=1 << 30,
    backends={"onnxruntime": "1.32"},
)


def device(name: str = "d1", bundle: str = "", *adapters: str, **facts: object) -> Device:
    serving = tuple(ServingAdapter(f"a{i}", "1", d) for i, d in enumerate(adapters))
    report = Report(bundle_digest=bundle, adapters=serving)
    return Device(name, 0.0, "key", replace(FACTS, **facts), report=report)


@pytest.fixture
def things(tmp_path):
    bundle, sql = artifacts.bundle(tmp_path), artifacts.adapter(tmp_path)
    newer = artifacts.bundle(tmp_path, revision="2")
    manifests = {m.digest: m for m in (bundle, newer, sql)}
    return bundle, newer, sql, manifests


def contents(manifests, *parts, **more) -> Contents:
    return Contents(artifacts.release("rel", *parts, **more), manifests)


def test_an_empty_device_gets_everything(things):
    bundle, _, sql, manifests = things
    assert ship_bytes(device(), contents(manifests, bundle, sql)) == bundle.bytes + sql.bytes


def test_an_adapter_ships_alone_to_a_device_with_the_bundle(things):
    bundle, _, sql, manifests = things
    (plan,) = make_plan(
        [device("d1", bundle.digest)], frozenset(), contents(manifests, bundle, sql), {}, ()
    ).devices
    assert plan.ship_bytes == sql.bytes
    assert not plan.builds_engine
    assert plan.build_s == 0.0


def test_what_the_device_runs_already_ships_nothing(things):
    bundle, _, sql, manifests = things
    assert (
        ship_bytes(device("d1", bundle.digest, sql.digest), contents(manifests, bundle, sql)) == 0
    )


def test_chunks_shared_between_bundles_ship_once(things):
    bundle, newer, _, manifests = things
    assert 0 < ship_bytes(device("d1", bundle.digest), contents(manifests, newer)) < newer.bytes


def test_a_device_that_runs_something_unpublished_counts_as_empty(things):
    bundle, _, _, manifests = things
    assert ship_bytes(device("d1", "sha256:gone"), contents(manifests, bundle)) == bundle.bytes


def test_build_time_comes_from_devices_of_the_same_model(things):
    bundle, _, _, manifests = things
    devices = [device("d1"), device("d2", device_model="Thor")]
    plan = make_plan(devices, frozenset(), contents(manifests, bundle), {"Orin": 90.0}, ())
    assert {d.device_id: d.build_s for d in plan.devices} == {"d1": 90.0, "d2": None}


def test_peak_disk_counts_the_largest_file_of_several_chunks_twice(things):
    bundle, _, _, manifests = things
    wanted = contents(manifests, bundle)
    assert peak_disk_bytes(device(), wanted) == 2 * bundle.bytes
    assert peak_disk_bytes(device("d1", bundle.digest), wanted) == 0


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"memory_bytes": 1 << 30}, "memory"),
        ({"agent_version": "0.1.9"}, "agent_version"),
        ({"agent_version": ""}, "agent_version"),
        ({"backends": {"tensorrt": "10"}}, "backend"),
        ({"disk_free_bytes": 100}, "disk"),
    ],
)
def test_a_device_that_cannot_take_it_is_refused_with_the_reason(things, changes, code):
    bundle, _, _, manifests = things
    limits = Constraints(4 << 30, "0.1.10", ("onnxruntime",))
    wanted = contents(manifests, bundle, constraints=limits)
    assert device_refusals(device(), wanted) == []
    (refusal,) = device_refusals(device(**changes), wanted)
    assert refusal.code == code
    assert refusal.need and refusal.have


def test_all_reasons_are_told_at_once(things):
    bundle, _, _, manifests = things
    wanted = contents(manifests, bundle, constraints=Constraints(min_memory_bytes=16 << 30))
    sick = replace(device(disk_free_bytes=1), quarantine="two machines")
    assert {r.code for r in device_refusals(sick, wanted)} == {"quarantined", "memory", "disk"}


def test_an_unknown_free_disk_is_not_held_against_a_device(things):
    bundle, _, _, manifests = things
    assert device_refusals(device(disk_free_bytes=0), contents(manifests, bundle)) == []


def test_disk_and_memory_come_after_what_no_room_would_help(things):
    bundle, _, _, manifests = things
    limits = Constraints(16 << 30, "9", ("tensorrt",), min_disk_free_bytes=1 << 40)
    found = device_refusals(device(), contents(manifests, bundle, constraints=limits))
    assert [r.code for r in found] == ["agent_version", "backend", "disk", "memory"]


def test_a_release_of_before_its_values_were_checked_is_refused_to_every_device(things):
    bundle, _, _, manifests = things
    wanted = contents(manifests, bundle, sampling=SamplingDefaults(top_p=7.0))
    (refusal,) = device_refusals(device(), wanted)
    assert str(refusal) == "sampling.top_p: needs above 0 and at most 1 (1 keeps all), has 7"


def test_a_bundle_of_other_weights_than_the_release_says_is_refused(tmp_path):
    int4 = artifacts.publish(tmp_path, "bundle", "tiny", "1", [b"x"], quant="int4")
    manifests = {int4.digest: int4}
    assert release_refusals(contents(manifests, int4, quant="int4")) == []
    (refusal,) = release_refusals(contents(manifests, int4, quant="nvfp4"))
    assert (refusal.code, refusal.have) == ("quant", "one of int4")


def test_an_operators_quarantine_is_told_from_a_cloned_identity(things):
    bundle, _, _, manifests = things
    cut_off = replace(device(), quarantine="odd", quarantined_by="ann")
    (refusal,) = device_refusals(cut_off, contents(manifests, bundle))
    assert refusal.need == "a device that nobody cut off"


def test_refused_devices_are_in_no_wave_and_cost_nothing(things):
    bundle, _, _, manifests = things
    devices = [device("a"), device("b", disk_free_bytes=1), device("c")]
    plan = make_plan(devices, frozenset({"c"}), contents(manifests, bundle), {}, (Wave(count=1),))
    assert [(d.device_id, d.wave) for d in plan.devices] == [("c", 1), ("a", 2), ("b", None)]
    assert plan.waves == (1, 1)
    assert plan.total_bytes == 2 * bundle.bytes
    assert [d.device_id for d in plan.refused] == ["b"]


def test_artifacts_that_do_not_belong_together_are_refused_by_name(things, tmp_path):
    bundle, _, sql, manifests = things
    other = artifacts.adapter(tmp_path, "other", base="sha256:" + "0" * 64)
    wide = artifacts.publish(tmp_path, "adapter", "wide", "1", [b"w"], rank=64)
    every = {**manifests, other.digest: other, wide.digest: wide}
    assert release_refusals(contents(every, bundle, sql)) == []
    found = release_refusals(contents(every, bundle, other, wide))
    assert [r.code for r in found] == ["adapter_base", "adapter_rank"]
    assert [r.code for r in release_refusals(contents(every, sql, bundle))] == ["bundle", "adapter"]


def test_a_graph_that_none_of_a_devices_backends_takes_is_refused_before_it_ships(tmp_path):
    native = artifacts.publish(tmp_path, "bundle", "tiny", "1", [b"x"], dialect="native")
    wanted = contents({native.digest: native}, native)
    (refusal,) = device_refusals(device(backends={"tensorrt": "10.3.0"}), wanted)
    assert refusal.code == "dialect"
    assert device_refusals(device(), wanted) == []


def _key(backend: str, version: str) -> dict[str, str]:
    return {"backend": backend, "backend_version": version}


@pytest.mark.parametrize(
    ("backend", "version", "graph"),
    [
        ("tensorrt", "10.3.0", "; from the legacy graph"),
        ("tensorrt", "10.16.1", "; from the native graph, or the legacy one where that has no"),
        ("tensorrt_rtx", "1.7.1", "; from the native graph, or the legacy one where that has no"),
        ("onnxruntime", "1.32", "; from the native graph"),
    ],
)
def test_the_plan_names_the_graph_that_the_device_builds(tmp_path, backend, version, graph):
    both = artifacts.publish(
        tmp_path, "bundle", "tiny", "1", [b"x"], dialect="native", dialects=["native", "legacy"]
    )
    mine = device(backends={backend: version}, engine_key=_key(backend, version))
    wanted = contents({both.digest: both}, both)
    assert device_refusals(mine, wanted) == []
    (plan,) = make_plan([mine], frozenset(), wanted, {}, ()).devices
    assert plan.builds_engine and graph in plan.engine.why
    assert plan.engine.why.endswith(graph) or "fused attention" in plan.engine.why


def test_two_graphs_that_no_backend_of_a_device_takes_are_refused(tmp_path):
    both = artifacts.publish(
        tmp_path, "bundle", "tiny", "1", [b"x"], dialect="native", dialects=["native", "legacy"]
    )
    wanted = contents({both.digest: both}, both)
    (refusal,) = device_refusals(device(backends={"tensorrt": "10.0.1"}), wanted)
    assert refusal.code == "dialect" and "native or legacy graph" in refusal.need
