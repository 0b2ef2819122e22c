"""Engines built elsewhere: used when key and answers are right, replaced by a build when not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from remora_agent.engine import opening
from remora_agent.engine.cache import MANIFEST
from remora_agent.engine.opening import EngineOptions
from remora_agent.hosting.engines import CachedEngines, EngineSettings
from remora_contract.bundle import load_bundle
from remora_contract.digests import canonical_json, digest_file
from remora_contract.engine import PREFILL, Ship, choose, load_engine_document, offered, prefill_of


def ignore(phase: str, done: float) -> None:
    """Progress nobody watches."""


def engines(folder: Path) -> CachedEngines:
    return CachedEngines(EngineSettings(folder, options=EngineOptions(rows=1, threads=1)))


@pytest.fixture
def built(tmp_path, real_bundles):
    """An engine of `real_bundles.plain` as another device built it, in a folder of its own."""
    elsewhere = tmp_path / "elsewhere"
    engines(elsewhere).build(real_bundles.plain, ignore)
    (entry,) = [p.parent for p in elsewhere.glob(f"*/{MANIFEST}")]
    return Path(shutil.copytree(entry, tmp_path / "shipped"))


@pytest.fixture
def no_builds(monkeypatch):
    """How many engines are built from now on."""
    count: list[str] = []
    real = opening.build_engine

    def counted(bundle_dir, bundle, recipe, cache, control):
        result = real(bundle_dir, bundle, recipe, cache, control)
        count.extend([] if result.from_cache else ["built"])
        return result

    monkeypatch.setattr(opening, "build_engine", counted)
    return count


def test_an_engine_with_our_key_is_used_without_a_build(tmp_path, real_bundles, built, no_builds):
    here = engines(tmp_path / "here")
    outcome = here.build(real_bundles.plain, ignore, [built])
    assert (outcome.source, no_builds) == ("shipped", [])
    assert outcome.engine_digest == load_engine_document(built).digest
    here.load(real_bundles.plain).close()
    assert here.build(real_bundles.plain, ignore, [built]).source == "cached"
    assert no_builds == []


def test_the_devices_whole_key_chooses_what_the_build_takes(tmp_path, real_bundles, built):
    here = engines(tmp_path / "here")
    document = load_engine_document(built)
    wanted = here.wanted(real_bundles.plain)
    assert wanted is not None
    assert isinstance(choose([offered(document)], wanted), Ship)
    here.build(real_bundles.plain, ignore, [built])
    assert here.wanted(real_bundles.plain) is None


def test_the_reported_key_agrees_with_the_recipe(tmp_path, real_bundles):
    here = engines(tmp_path / "here")
    for directory in (real_bundles.plain, real_bundles.int4):
        quant = load_bundle(directory).graph.quant
        facts = {"quant": quant.kind, "activations": quant.activations}
        told = {**here.key()}
        told[PREFILL] = prefill_of(told[PREFILL], facts)
        wanted = here.wanted(directory)
        assert wanted is not None
        assert told == wanted.recipe


def test_a_damaged_file_is_found_before_it_is_loaded(tmp_path, real_bundles, built, no_builds):
    with (built / "model.onnx").open("r+b") as f:
        f.seek(100)
        f.write(b"\xff\x00\xff")
    outcome = engines(tmp_path / "here").build(real_bundles.plain, ignore, [built])
    assert (outcome.source, no_builds) == ("built", ["built"])
    assert "damaged" in outcome.why


@pytest.mark.parametrize("name", ["base.onnx", "model.onnx"])
def test_an_engine_that_fails_its_probe_is_built_once_instead(
    tmp_path, real_bundles, built, no_builds, name
):
    """Its digests are right: whoever made it was wrong, or worse."""
    _forge(built, name)
    here = engines(tmp_path / "here")
    adapters = [real_bundles.adapter_dir("a", "r1")]
    outcome = here.build(real_bundles.plain, ignore, [built], adapters)
    assert (outcome.source, no_builds) == ("built", ["built"])
    assert "not used" in outcome.why
    again = here.build(real_bundles.plain, ignore, [built])
    assert (again.source, no_builds) == ("cached", ["built"])
    here.load(real_bundles.plain).close()


def test_an_engine_with_another_key_is_built(tmp_path, real_bundles, built, no_builds):
    manifest = json.loads((built / MANIFEST).read_bytes())
    manifest["key"]["recipe"]["backend_version"] = "0.1"
    (built / MANIFEST).write_bytes(canonical_json(manifest))
    outcome = engines(tmp_path / "here").build(real_bundles.plain, ignore, [built])
    assert (outcome.source, no_builds) == ("built", ["built"])


def test_another_backend_version_rebuilds_before_anything_is_loaded(
    tmp_path, real_bundles, monkeypatch, no_builds
):
    from remora_agent.engine.ort import builder

    here = engines(tmp_path / "here")
    here.build(real_bundles.plain, ignore)
    monkeypatch.setattr(builder.ort, "__version__", "1.99.0")
    here.load(real_bundles.plain).close()
    assert no_builds == ["built", "built"]


def test_a_new_run_still_spares_the_engines_that_were_used_last(tmp_path, real_bundles):
    settings = EngineSettings(
        tmp_path / "here", cache_bytes=1, options=EngineOptions(rows=1, threads=1)
    )
    for directory in (real_bundles.plain, real_bundles.int4):
        CachedEngines(settings).build(directory, ignore)
    assert CachedEngines(settings).wanted(real_bundles.plain) is None
    assert CachedEngines(settings).wanted(real_bundles.int4) is None


def _forge(directory: Path, name: str) -> None:
    """Other bytes of the same size for a model, and a manifest that vouches for them."""
    path = directory / name
    path.write_bytes(bytes(path.stat().st_size))
    manifest = json.loads((directory / MANIFEST).read_bytes())
    for file in manifest["files"]:
        if file["path"] == path.name:
            file["digest"] = digest_file(path)
    (directory / MANIFEST).write_bytes(canonical_json(manifest))
