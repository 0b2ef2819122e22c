"""The plan says of each device whether its engine is shipped or built, and why."""

from __future__ import annotations

import pytest

from remora_contract.bundle import GRAPH_FILE
from remora_contract.digests import digest_bytes
from remora_contract.engine import build_disk_bytes
from remora_controller.domain import Device, Facts, Report
from remora_controller.planner import (
    Contents,
    engine_plan,
    peak_disk_bytes,
    release_refusals,
    ship_bytes,
)
from tests.controller.artifacts import publish, release

RECIPE = {"backend": "onnxruntime", "backend_version": "1.32.0", "prefill": "plain"}
GRAPH = b"graph" * 100


def graph_bundle(root):
    made = publish(root, "bundle", "tiny", "1", [GRAPH], quant="none")
    file = made.files[0]
    return type(made)(
        **{**vars(made), "files": (type(file)(**{**vars(file), "path": GRAPH_FILE}),)}
    )


def engine(root, revision="1", graph=GRAPH, **recipe):
    facts = {"files": {GRAPH_FILE: digest_bytes(graph)}, "recipe": {**RECIPE, **recipe}}
    return publish(root, "engine", "fast", revision, [revision.encode() * 700], **facts)


def contents(root, *engines):
    made = (graph_bundle(root), *engines)
    wanted = release("r", made[0], engines=tuple(e.digest for e in engines) or None)
    return Contents(wanted, {m.digest: m for m in made})


def device(bundle="", **key):
    recipe = {**RECIPE, "prefill": "auto", **key}
    return Device("d", 0.0, "", Facts(engine_key=recipe), report=Report(bundle_digest=bundle))


def test_an_engine_of_the_devices_key_is_shipped_and_counted(tmp_path):
    mine, other = engine(tmp_path), engine(tmp_path, "2", backend_version="1.30.0")
    both = contents(tmp_path, other, mine)
    plan = engine_plan(device(), both)
    assert (plan.what, plan.digest) == ("shipped", mine.digest)
    assert ship_bytes(device(), both) == len(GRAPH) + mine.bytes
    assert peak_disk_bytes(device(), both) == len(GRAPH) + mine.bytes


def test_a_device_with_another_key_builds_and_the_field_is_named(tmp_path):
    some = contents(tmp_path, engine(tmp_path, machine="avx512"))
    plan = engine_plan(device(machine="avx2"), some)
    assert plan.what == "built"
    assert "machine avx512, the device has avx2" in plan.why
    assert ship_bytes(device(machine="avx2"), some) == len(GRAPH)


@pytest.mark.parametrize(
    ("key", "sizes"), [({}, 5), ({"gpu.rows": "8"}, 2), ({"prefill": "int8"}, 5)]
)
def test_the_disk_of_a_build_is_what_the_device_will_ask_for(tmp_path, key, sizes):
    """Prompts in int8 are nothing to a bundle of floats; the next test has one of integers."""
    some = contents(tmp_path, engine(tmp_path, backend_version="1.30.0"))
    assert peak_disk_bytes(device(**key), some) == (1 + sizes) * len(GRAPH)


def test_prompts_in_int8_cost_disk_too():
    assert build_disk_bytes(100, {"prefill": "int8"}) == 1100


def test_a_device_that_does_not_tell_its_key_builds(tmp_path):
    plan = engine_plan(Device("d", 0.0, ""), contents(tmp_path, engine(tmp_path)))
    assert (plan.what, plan.digest) == ("built", None)
    assert "older" in plan.why


def test_a_device_that_runs_the_bundle_keeps_its_engine(tmp_path):
    some = contents(tmp_path, engine(tmp_path))
    assert engine_plan(device(some.release.bundle), some).what == "kept"


def test_a_release_refuses_engines_of_another_graph(tmp_path):
    assert release_refusals(contents(tmp_path, engine(tmp_path))) == []
    found = release_refusals(contents(tmp_path, engine(tmp_path, graph=b"another")))
    assert [r.code for r in found] == ["engine_graph"]
    adapter = publish(tmp_path, "adapter", "a", "1", [b"x"])
    found = release_refusals(contents(tmp_path, adapter))
    assert [r.code for r in found] == ["engine"]
