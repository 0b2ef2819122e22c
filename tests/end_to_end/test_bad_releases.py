"""A release that cannot work stops by itself, and nobody who asks a device notices."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from examples.demo.traffic import Traffic, judge
from remora_contract.artifact import Manifest, chunk_key, manifest_key
from remora_contract.bundle import BUNDLE_JSON, GOLDEN_JSON, BundleFile, load_bundle
from remora_contract.digests import canonical_json, digest_bytes
from remora_contract.strict import loads

pytestmark = pytest.mark.slow


def test_an_adapter_damaged_in_the_repository_goes_back_by_itself(stage):
    agents = stage.join("one", "two")
    stage.release("good", stage.artifacts.bundle.reference, "alpha", "beta-1")
    stage.roll_out("good")
    _damage(stage.repository, stage.artifacts.built.adapters["beta-2"].digest)
    with Traffic(agents, stage.artifacts.cast) as traffic:
        stage.release("bad", stage.artifacts.bundle.reference, "alpha", "beta-2")
        ended = stage.ended(stage.start("bad", "--wave", "1"))
    _assert_nobody_noticed(stage, agents, traffic, ended)
    assert "chunk" in _error_of_the_only_device_that_tried(stage, ended)


def test_a_bundle_that_fails_its_golden_prompts_never_serves(stage, tmp_path):
    agents = stage.join("one", "two")
    stage.release("good", stage.artifacts.bundle.reference, "alpha", "beta-1")
    stage.roll_out("good")
    lying = _with_other_golden(stage.artifacts.folder / stage.artifacts.bundle.directory, tmp_path)
    stage.shop.run("remora-build", "publish", str(lying), str(stage.repository), "--name", "lying")
    with Traffic(agents, stage.artifacts.cast) as traffic:
        stage.release("bad", "lying", "alpha", "beta-1")
        ended = stage.ended(stage.start("bad", "--wave", "1"))
    _assert_nobody_noticed(stage, agents, traffic, ended)
    assert "golden" in _error_of_the_only_device_that_tried(stage, ended)


def _error_of_the_only_device_that_tried(stage, ended):
    assert sorted(d["outcome"] for d in ended["devices"]) == ["reverted", "waiting"]
    events = stage.fleet.operator("events", "--limit", "200")
    (failed,) = [e for e in events if e["name"] == "release.failed"]
    return failed["detail"]["error"]


def _assert_nobody_noticed(stage, agents, traffic, ended):
    assert ended["state"] == "ROLLED_BACK"
    assert stage.running() == {"good"}
    verdict = judge(traffic.requests, stage.artifacts.cast, stage.artifacts.built.digests())
    assert verdict.complaints == ()
    assert "beta-2" not in verdict.answered_by
    for agent in agents:
        stage.ask(agent, stage.artifacts.cast.variants(1))


def _damage(repository, digest):
    """Flips a byte of the artifact's largest chunk, leaving its size."""
    manifest = loads(Manifest, (repository / manifest_key(digest)).read_bytes(), "manifest")
    chunks = manifest.chunks()
    path = repository / chunk_key(max(chunks, key=chunks.__getitem__))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.chmod(0o644)
    path.write_bytes(data)


def _with_other_golden(bundle_directory, tmp_path):
    """The same bundle, whose golden prompts expect what no engine of it answers."""
    lying = tmp_path / "lying"
    shutil.copytree(bundle_directory, lying)
    golden = json.loads((lying / GOLDEN_JSON).read_text())
    for prompt in golden["prompts"]:
        prompt["expected"] = [(token + 1) % 256 for token in prompt["expected"]]
        prompt["margin"] = [100.0 for _ in prompt["margin"]]
    data = canonical_json(golden)
    (lying / GOLDEN_JSON).write_bytes(data)
    bundle = load_bundle(lying)
    listed = BundleFile(GOLDEN_JSON, len(data), digest_bytes(data))
    files = tuple(listed if f.path == GOLDEN_JSON else f for f in bundle.files)
    (lying / BUNDLE_JSON).write_bytes(canonical_json(dataclasses.replace(bundle, files=files)))
    return lying
