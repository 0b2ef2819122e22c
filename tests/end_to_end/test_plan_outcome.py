"""What `remora plan` says is what then happens: bytes, engine, disk, and who is refused and why."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from examples.demo.processes import DemoFailed, await_value
from tests.end_to_end.deep import DEEP

pytestmark = pytest.mark.slow

# Beside artifacts and engine: state.db with its log, links, documents of a few kilobytes.
UNPLANNED_BYTES = 512 << 10


def test_bytes_engine_and_disk_of_every_kind_of_change_are_as_planned(deep_stage):
    stage = deep_stage
    (agent,) = stage.join("one")
    bundle = stage.artifacts.bundle.reference
    stage.release("first", bundle, "alpha", "beta-1")
    stage.release("adapter", bundle, "alpha", "beta-2")
    stage.release_file("words", {"alpha": "alpha", "beta": "beta@2"}, sampling={"top_k": 3})
    stage.release("model", DEEP)
    changes = ("first", "adapter", "words", "model", "words")
    assert [_compare(stage, agent, n) for n in changes] == [
        ("built", 3),
        ("kept", 1),
        ("kept", 0),
        ("built", 1),
        ("kept", 0),  # the release before: its artifacts and its engine are still there
    ]


def test_memory_is_refused_in_the_plan_exactly_where_the_device_then_refuses(deep_stage):
    """The agent's floor is moved while it is away, so that it hears of a release which the plan,
    from what it told before, thought it could take."""
    stage = deep_stage
    (agent,) = stage.join("one")
    stage.release("first", stage.artifacts.bundle.reference)
    stage.roll_out("first")
    stage.release("model", DEEP)
    (planned,) = stage.fleet.operator("plan", "model")["devices"]
    assert planned["refusals"] == [] and int(planned["peak_memory_bytes"]) > 0
    least = _least_memory(stage)
    _move_floor(stage, agent, psutil.virtual_memory().total - least + 1)
    rollout = stage.start("model")
    stage.fleet.restart(agent)
    ended = stage.ended(rollout)
    assert ended["state"] == "ROLLED_BACK"
    assert stage.phases(agent, "model") == ["ASSIGNED", "REFUSED"]
    (refused,) = stage.fleet.operator("plan", "model")["devices"]
    (refusal,) = refused["refusals"]
    assert refusal["code"] == "memory"
    (device,) = ended["devices"]
    assert refusal["message"] in device["error"]
    _move_floor(stage, agent, psutil.virtual_memory().total - least)
    stage.fleet.restart(agent)
    await_value(lambda: _refused_codes(stage) == [], "a byte less is enough", 60.0, stage.shop)


def _refused_codes(stage):
    (device,) = stage.fleet.operator("plan", "model")["devices"]
    return [r["code"] for r in device["refusals"]]


def _least_memory(stage):
    """Without the floor, by the manifest of the deep model; one row of its own context."""
    manifests = [json.loads(p.read_text()) for p in (stage.repository / "manifests").iterdir()]
    (facts,) = [m["facts"] for m in manifests if m["facts"].get("layers") == 16]
    sizes = facts["onnxruntime_memory"]
    return int(sizes["weights"] + sizes["kv_token"] * (facts["context"] + 1))


def _move_floor(stage, agent, floor):
    """Leaves the agent switched off, and long enough for the controller to notice."""
    stage.fleet.stop(agent)
    plain = [x for x in agent.config.read_text().splitlines() if "memory_floor" not in x]
    at = plain.index("[serving]")
    lines = [*plain[: at + 1], f"memory_floor_bytes = {floor}", *plain[at + 1 :]]
    agent.config.write_text("\n".join(lines) + "\n")


def _compare(stage, agent, name):
    """Rolls out what was planned; what was planned of the engine, and how many artifacts came."""
    (planned,) = stage.fleet.operator("plan", name)["devices"]
    built, fetched = len(agent.events("engine.built")), len(agent.events("artifact.fetched"))
    with peak_disk(agent.state) as disk:
        stage.roll_out(name)
    came = agent.events("artifact.fetched")[fetched:]
    assert sum(e["bytes"] for e in came) == int(planned["ship_bytes"]), name
    is_built = len(agent.events("engine.built")) > built
    assert is_built == (planned["engine"] == "built"), name
    # The most that it may come to; of a build, what is asked for is not quite reached.
    most = int(planned["peak_disk_bytes"])
    assert most / 2 - UNPLANNED_BYTES < disk[0] <= most + UNPLANNED_BYTES, (name, disk, most)
    return planned["engine"], len(came)


def test_who_is_refused_and_why_is_the_same_in_plan_and_start_and_nobody_else_is(stage):
    one, two = stage.join("one", "two")
    ids = {stage.device_id(one): one, stage.device_id(two): two}
    stage.shop.run("remora", "devices", "pin", stage.device_id(two), "--reason", "on show")
    wants = {"min_memory_bytes": 1 << 60, "min_agent_version": "99.0", "backends": ["tensorrt"]}
    stage.release_file("greedy", {}, constraints=wants)
    stage.release_file("modest", {})
    refused = _refusals(stage, "greedy", ids)
    assert {n: set(codes) for n, codes in refused.items()} == {
        "one": {"memory", "agent_version", "backend"},
        "two": {"memory", "agent_version", "backend", "pinned"},
    }
    with pytest.raises(DemoFailed) as told:
        stage.start("greedy")
    for message in refused["one"].values():
        assert message in " ".join(str(told.value).split())
    assert stage.phases(one, "greedy") == [], "nothing was shipped to ask"
    assert set(_refusals(stage, "modest", ids)["two"]) == {"pinned"}
    ended = stage.ended(stage.start("modest"))
    assert ended["state"] == "COMPLETED"
    assert [ids[d["device_id"]].name for d in ended["devices"]] == ["one"]
    assert stage.phases(two, "modest") == []


def _refusals(stage, name, agents):
    """By device and code, what `remora plan` says."""
    devices = stage.fleet.operator("plan", name)["devices"]
    return {
        agents[d["device_id"]].name: {r["code"]: r["message"] for r in d.get("refusals", [])}
        for d in devices
    }


@contextmanager
def peak_disk(folder: Path) -> Iterator[list[int]]:
    """How many bytes more than at the beginning were in the folder, at the most."""
    began, most, done = _bytes_in(folder), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            most[0] = max(most[0], _bytes_in(folder) - began)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()
        most[0] = max(most[0], _bytes_in(folder) - began)  # whenever the thread looked last


def _bytes_in(folder: Path) -> int:
    """Of files, each once however many links it has."""
    sizes = {}
    for directory, _, names in os.walk(folder):  # passes over folders that vanish meanwhile
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found = Path(directory, name).lstat()
                sizes[found.st_ino] = found.st_size
    return sum(sizes.values())
