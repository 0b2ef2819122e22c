"""Engines in releases, with the real commands: what `remora plan` says is what then happens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from remora_agent.engine.cache import MANIFEST
from remora_agent.engine.opening import EngineOptions
from remora_agent.hosting.engines import CachedEngines, EngineSettings
from remora_contract.artifact import Manifest, chunk_key, manifest_key
from remora_contract.digests import canonical_json, digest_file
from remora_contract.strict import loads
from tests.agent.control.test_real_fleet import RealFleet, put, until

pytestmark = pytest.mark.slow
ENGINE = "fast@r1"


@pytest.fixture
def fleet(tmp_path):
    made = RealFleet(tmp_path)
    yield made
    made.close()


@pytest.fixture
def built(tmp_path, real_bundles):
    """The bundle's engine as another process of this machine built it."""
    cache = tmp_path / "elsewhere"
    settings = EngineSettings(cache, options=EngineOptions(rows=2, threads=1))
    CachedEngines(settings).build(real_bundles.plain, lambda phase, done: None)
    (entry,) = [p.parent for p in cache.glob(f"*/{MANIFEST}")]
    return Path(shutil.copytree(entry, tmp_path / "shipped"))


def rolled_out(fleet, real_bundles, engine) -> tuple[dict, dict]:
    """What the plan said of the device's engine, and the `engine.built` event that came of it."""
    put(fleet, real_bundles.plain, "base", "r1")
    put(fleet, engine, "fast", "r1")
    fleet.join()
    fleet.start_agent()
    until(lambda: fleet.device()["status"] == "online", fleet.story)
    fleet.run(
        *("remora", "releases", "create", "--name", "one"),
        *("--bundle", "base@r1", "--engine", ENGINE),
    )
    plan = json.loads(fleet.run("remora", "plan", "one", "--json"))["devices"][0]
    fleet.roll_out("one")
    return plan, built_event(fleet)


def built_event(fleet) -> dict:
    def look():
        events = json.loads(fleet.run("remora", "events", "--limit", "200", "--json"))
        return [e["detail"] for e in events if e["name"] == "engine.built"]

    (event,) = until(look, fleet.story)
    return event


def test_an_engine_with_the_devices_key_is_shipped_and_nothing_is_built(fleet, real_bundles, built):
    plan, event = rolled_out(fleet, real_bundles, built)
    assert (plan["engine"], plan.get("builds_engine", False)) == ("shipped", False)
    assert (event["source"], event["why"]) == ("shipped", "its build key is the device's")
    assert not fleet.logged("engine.built"), "nothing was built"
    fetched = sum(int(e["bytes"]) for e in fleet.logged("artifact.fetched"))
    assert fetched == int(plan["ship_bytes"])


def test_an_engine_with_another_key_is_built_as_the_plan_said(fleet, real_bundles, built):
    _changed(built, lambda m: m["key"]["recipe"].update(backend_version="0.1"))
    plan, event = rolled_out(fleet, real_bundles, built)
    assert plan["engine"] == "built"
    assert "backend_version 0.1, the device has" in plan["engine_why"]
    assert event["source"] == "built"
    assert len(fleet.logged("engine.built")) == 1
    fetched = sum(int(e["bytes"]) for e in fleet.logged("artifact.fetched"))
    assert fetched == int(plan["ship_bytes"]), "the engine of another device was not fetched"


def test_an_engine_that_fails_its_probe_is_built_once_and_told(fleet, real_bundles, built):
    path = built / "base.onnx"
    path.write_bytes(bytes(path.stat().st_size))

    def vouch(manifest):
        (file,) = [f for f in manifest["files"] if f["path"] == path.name]
        file["digest"] = digest_file(path)

    _changed(built, vouch)
    plan, event = rolled_out(fleet, real_bundles, built)
    assert plan["engine"] == "shipped"
    assert event["source"] == "built"
    assert "the shipped engine was not used" in event["why"]
    assert len(fleet.logged("engine.built")) == 1


def test_an_engine_damaged_in_the_repository_is_built_instead(fleet, real_bundles, built):
    put(fleet, real_bundles.plain, "base", "r1")
    digest = put(fleet, built, "fast", "r1")
    manifest = loads(Manifest, (fleet.store.root / manifest_key(digest)).read_bytes(), "manifest")
    chunks = manifest.chunks()
    path = fleet.store.root / chunk_key(max(chunks, key=chunks.__getitem__))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.chmod(0o644)
    path.write_bytes(data)
    _, event = rolled_out(fleet, real_bundles, built)
    assert event["source"] == "built"
    events = json.loads(fleet.run("remora", "events", "--limit", "200", "--json"))
    (chosen,) = [e["detail"] for e in events if e["name"] == "engine.chosen"]
    assert (chosen["engine"], "chunk" in chosen["why"]) == ("built", True)


def _changed(directory: Path, change) -> None:
    manifest = json.loads((directory / MANIFEST).read_bytes())
    change(manifest)
    (directory / MANIFEST).write_bytes(canonical_json(manifest))
