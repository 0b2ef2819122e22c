"""Two real agents and a real controller: one engine is built, and what `remora plan` said of it
is what then happens."""

from __future__ import annotations

import json
import threading
import time

import psutil
import pytest

from examples.demo.processes import await_value
from tests.end_to_end.holding import BUILD_CHILD, stopped_child

pytestmark = pytest.mark.slow
LEASE_S = 3.0


@pytest.fixture
def sharing(stage):
    """The stage, with a controller that lets the whole fleet share engines."""
    config = stage.shop.folder / stage.fleet.home / "controller.toml"
    before = 'engine_sharing = "off"'
    assert before in config.read_text()
    text = config.read_text().replace(before, 'engine_sharing = "all"')
    config.write_text(f"{text}engine_lease_s = {LEASE_S}\n")
    stage.fleet.controller.kill()
    stage.fleet.serve()
    return stage


class Builds:
    """Looks for build children of agents. On a machine that is out of breath it may miss one."""

    def __init__(self, *agents):
        self.seen = {agent.name: set() for agent in agents}
        self._agents, self._stop = agents, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _look(self):
        while not self._stop.wait(0.02):
            for agent in self._agents:
                self.seen[agent.name].update(builders(agent))


def builders(agent):
    """Process ids of the agent's engine builds under way."""
    try:
        children = psutil.Process(agent.daemon.process.pid).children(recursive=True)
        return [c.pid for c in children if BUILD_CHILD in c.cmdline()]
    except psutil.NoSuchProcess:
        return []


def ids(stage, *agents):
    """Device ids by the agents' names."""
    devices = stage.fleet.operator("devices", "list")
    named = {d["labels"]["name"]: d["device_id"] for d in devices}
    return [named[a.name] for a in agents]


def events(stage, name):
    """Details of the events of that name, by device, oldest first."""
    found = reversed(stage.fleet.operator("events", "--limit", "500"))
    return [(e["device_id"], e["detail"]) for e in found if e["name"] == name]


def shared_engine(stage):
    (engine,) = stage.fleet.operator("engines", "list")["engines"]
    return engine


def test_the_first_device_builds_and_the_second_fetches_as_the_plan_said(sharing):
    agents = sharing.join("one", "two")
    sharing.release("all", sharing.artifacts.bundle.reference, "alpha", "beta-1")
    plan = sharing.fleet.operator("plan", "all", "--wave", "1")
    assert plan["engine_sharing"] == "all"
    first, second = plan["devices"]
    assert (first["engine"], first["shares_engine"]) == ("built", True)
    assert (second["engine"], second["engine_from"]) == ("fetched", first["device_id"])

    with Builds(*agents) as builds:
        assert sharing.ended(sharing.start("all", "--wave", "1"))["state"] == "COMPLETED"

    by_id = dict(zip(ids(sharing, *agents), agents, strict=True))
    builder, fetcher = by_id[first["device_id"]], by_id[second["device_id"]]
    assert len(builder.events("engine.built")) == 1, "the planned builder built"
    assert not builds.seen[fetcher.name], "the planned fetcher started no build"
    built = dict(events(sharing, "engine.built"))
    assert (built[first["device_id"]]["source"], built[first["device_id"]]["shares"]) == (
        "built",
        True,
    )
    assert built[second["device_id"]]["source"] == "shared"
    assert not fetcher.events("engine.built"), "nothing was built there"

    ((uploader, uploaded),) = events(sharing, "engine.uploaded")
    ((taker, fetched),) = events(sharing, "engine.fetched")
    assert (uploader, taker) == (first["device_id"], second["device_id"])
    engine = shared_engine(sharing)
    assert (engine["built_by"], engine["taken"], engine["state"]) == (uploader, 1, "READY")
    assert uploaded["bytes"] == fetched["bytes"] == int(engine["bytes"])
    assert fetched["built_by"] == uploader
    for agent in agents:
        sharing.ask(agent, sharing.artifacts.cast.variants(1))


def test_a_later_device_is_told_the_bytes_that_it_then_fetches(sharing):
    _, second = sharing.join("one", "two")
    sharing.release("all", sharing.artifacts.bundle.reference)
    sharing.roll_out("all", "--selector", "name=one")
    await_value(lambda: shared_engine(sharing)["state"] == "READY", "the upload", 60.0)
    (device,) = ids(sharing, second)
    (plan,) = sharing.fleet.operator("plan", "all", "--selector", "name=two")["devices"]
    assert plan["engine"] == "fetched"
    assert plan["engine_bytes"] == shared_engine(sharing)["bytes"]
    sharing.roll_out("all", "--selector", "name=two")
    received = sum(d["bytes"] for who, d in events(sharing, "artifact.fetched") if who == device)
    received += sum(d["bytes"] for who, d in events(sharing, "engine.fetched") if who == device)
    assert received == int(plan["ship_bytes"])


def test_when_the_builder_is_killed_the_other_takes_over_after_the_lease(sharing):
    agents = sharing.join("one", "two")
    sharing.release("all", sharing.artifacts.bundle.reference)
    with stopped_child(BUILD_CHILD, *agents) as build:
        rollout = sharing.start("all", "--wave", "2", "--threshold", "0.5")
        above = {p.pid for p in build().parents()}
        (builder,) = [a for a in agents if a.daemon.process.pid in above]
        (other,) = [a for a in agents if a is not builder]
        await_value(lambda: other.events("engine.waiting"), "the other waits", 60.0, sharing.shop)
        builder.daemon.kill()
        killed_at = time.monotonic()

    lost, taker = ids(sharing, builder, other)
    await_value(lambda: shared_engine(sharing)["state"] == "READY", "the other's upload", 60.0)
    assert time.monotonic() - killed_at > LEASE_S / 2, "the lease had to pass first"
    engine = shared_engine(sharing)
    assert (engine["built_by"], engine["failed"]) == (taker, 1)
    waited = [line["why"] for line in other.events("engine.waiting")]
    assert waited and waited[0].startswith(f"waiting for {lost} to build")
    (built,) = [d for who, d in events(sharing, "engine.built") if who == taker]
    assert built["source"] == "built"
    assert "lost" in built["why"]

    sharing.fleet.restart(builder)
    assert sharing.ended(rollout)["state"] == "COMPLETED"
    await_value(
        lambda: any(who == lost for who, _ in events(sharing, "engine.built")), "its engine", 60.0
    )
    (came,) = [d for who, d in events(sharing, "engine.built") if who == lost]
    assert came["source"] == "shared", json.dumps(came)
