"""Which engine fits a device: build keys compared field by field, the same for plan and device."""

from __future__ import annotations

import dataclasses
import json

import pytest

from remora_contract.bundle import GOLDEN_JSON, GRAPH_FILE, LEGACY_GRAPH_FILE, BundleFile
from remora_contract.digests import canonical_json, digest_bytes
from remora_contract.engine import (
    DIALECT,
    ENGINE_JSON,
    Build,
    EngineDocument,
    EngineKey,
    Ship,
    Wanted,
    choose,
    flat,
    load_engine_document,
    manifest_facts,
    offered,
    offered_in,
    prefill_of,
)
from remora_contract.errors import ArtifactInvalid, DocumentInvalid
from remora_contract.release import Release

GRAPH = BundleFile(GRAPH_FILE, 10, digest_bytes(b"graph"))
GOLDEN = BundleFile(GOLDEN_JSON, 10, digest_bytes(b"golden"))
RECIPE = {
    "backend": "tensorrt",
    "backend_version": "10.3.0",
    "prefill": "plain",
    "gpu": {"processors": [87], "rows": 8},
}


def engine(files=(GRAPH,), **recipe):
    plan = BundleFile("engine.plan", 4, digest_bytes(b"plan"))
    return EngineDocument(EngineKey(files, {**RECIPE, **recipe}), (plan,), {"context": "512"})


def wanted(*, is_whole=True, **recipe):
    files = {f.path: f.digest for f in (GRAPH, GOLDEN)}
    return Wanted(files, {**flat(RECIPE), **recipe}, is_whole)


def test_an_engine_of_the_same_key_is_shipped():
    mine = engine()
    assert choose([offered(engine(backend_version="11")), offered(mine)], wanted()) == Ship(
        mine.digest, "its build key is the device's"
    )


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"backend_version": "10.16"}, "backend_version 10.16, the device has 10.3.0"),
        ({"gpu": {"processors": [86, 89], "rows": 8}}, "gpu.processors 86,89, the device has 87"),
        ({"gpu": {"processors": [87], "rows": 4}}, "gpu.rows 4, the device has 8"),
        ({"gpu": {"processors": [87], "rows": 8, "driver": "540"}}, "gpu.driver 540"),
    ],
)
def test_one_field_that_differs_builds_and_is_named(other, named):
    chosen = choose([offered(engine(**other))], wanted())
    assert isinstance(chosen, Build)
    assert named in chosen.why


def test_another_graph_builds():
    other = BundleFile(GRAPH_FILE, 10, digest_bytes(b"other"))
    chosen = choose([offered(engine((other,)))], wanted())
    assert isinstance(chosen, Build)
    assert GRAPH_FILE in chosen.why


def test_golden_prompts_count_only_where_they_decided():
    plain, decided = engine(), engine((GRAPH,), prefill="auto")
    assert isinstance(choose([offered(plain)], wanted()), Ship)
    chosen = choose([offered(decided)], wanted(prefill="auto"))
    assert isinstance(chosen, Build)
    assert GOLDEN_JSON in chosen.why
    whole = engine((GRAPH, GOLDEN), prefill="auto")
    assert isinstance(choose([offered(whole)], wanted(prefill="auto")), Ship)


def test_what_a_device_did_not_tell_is_said():
    told = {k: v for k, v in flat(RECIPE).items() if k != "gpu.rows"}
    part = Wanted(wanted().files, told, is_whole=False)
    chosen = choose([offered(engine())], part)
    assert isinstance(chosen, Ship)
    assert "gpu.rows" in chosen.why
    assert isinstance(choose([offered(engine())], dataclasses.replace(part, is_whole=True)), Build)


def test_a_device_that_says_nothing_builds():
    assert isinstance(choose([offered(engine())], Wanted({}, {}, is_whole=False)), Build)
    assert isinstance(choose([], wanted()), Build)


def test_a_manifest_says_what_the_document_does():
    document = engine()
    facts = json.loads(json.dumps(manifest_facts(document)))
    assert offered_in(document.digest, facts) == offered(document)
    for bad in ({}, {**facts, "recipe": {"a": 1}}, {**facts, "files": None}):
        with pytest.raises(ArtifactInvalid, match="publish it again"):
            offered_in(document.digest, bad)


def test_a_document_is_read_as_it_was_written(tmp_path):
    document = engine()
    (tmp_path / ENGINE_JSON).write_bytes(canonical_json(document))
    assert load_engine_document(tmp_path).digest == document.digest
    lies = {**json.loads(canonical_json(document)), "files": []}
    (tmp_path / ENGINE_JSON).write_bytes(json.dumps(lies).encode())
    with pytest.raises(DocumentInvalid, match="has files"):
        load_engine_document(tmp_path)


@pytest.mark.parametrize("choice", ["auto", "int8", "plain"])
def test_int8_prompts_need_integers_float_activations_and_no_experts(choice):
    assert prefill_of(choice, {"quant": "int4"}) == choice
    assert prefill_of(choice, {"quant": "none"}) == "plain"
    assert prefill_of(choice, {"quant": "int8", "activations": "int8"}) == "plain"
    assert prefill_of(choice, {"quant": "int8", "experts": True}) == "plain"


def test_a_release_without_engines_is_the_document_that_it_was():
    release = Release(1, "r", digest_bytes(b"bundle"))
    assert b"engines" not in canonical_json(release)
    assert release.all_digests() == release.artifact_digests()


def test_a_release_lists_an_engine_once():
    bundle, one = digest_bytes(b"bundle"), digest_bytes(b"one")
    release = Release(1, "r", bundle, engines=(one,))
    assert release.all_digests() == (bundle, one)
    assert release.artifact_digests() == (bundle,)
    for wrong in ((), (one, one), tuple(digest_bytes(b"%d" % i) for i in range(65))):
        with pytest.raises(ValueError, match="engine"):
            Release(1, "r", bundle, engines=wrong)
    with pytest.raises(DocumentInvalid):
        Release(1, "r", bundle, engines=("../up",))


LEGACY_GRAPH = BundleFile(LEGACY_GRAPH_FILE, 12, digest_bytes(b"legacy graph"))


def of_legacy():
    return engine((GRAPH, LEGACY_GRAPH), dialect="legacy")


def wanting(first, *others, is_whole=True):
    """A device's wish for a bundle with two graphs; None: its native graph."""
    files = {f.path: f.digest for f in (GRAPH, LEGACY_GRAPH, GOLDEN)}
    recipes = [flat({**RECIPE, **({DIALECT: d} if d else {})}) for d in (first, *others)]
    return Wanted(files, recipes[0], is_whole, tuple(recipes[1:]))


@pytest.mark.parametrize("is_whole", [True, False])
def test_an_engine_of_the_better_graph_comes_before_one_of_the_other(is_whole):
    native, legacy = engine(), of_legacy()
    every = [offered(legacy), offered(native)]
    wanted = wanting(None, "legacy", is_whole=is_whole)
    assert choose(every, wanted) == Ship(native.digest, "its build key is the device's")
    assert choose(every[:1], wanted) == Ship(legacy.digest, "its build key is the device's")


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("first", [None, "legacy"])
def test_a_device_that_takes_one_graph_gets_no_engine_of_the_other(first, is_whole):
    other = of_legacy() if first is None else engine()
    chosen = choose([offered(other)], wanting(first, is_whole=is_whole))
    assert isinstance(chosen, Build) and "dialect" in chosen.why


def test_an_engine_of_a_bundle_with_two_graphs_is_known_by_the_first():
    assert of_legacy().base_digest == engine().base_digest == GRAPH.digest
    assert of_legacy().key.digest != engine().key.digest
