"""Use-case documents: QAIRT's spelling and ours, strictly, and the same when written again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from remora_contract.digests import canonical_json, digest_bytes
from remora_contract.errors import ArtifactInvalid, DocumentInvalid, Unsupported
from remora_contract.release import Release, ReleaseAdapter, ReleaseUseCase, WeightedName
from remora_contract.strict import parse
from remora_contract.use_case_forms import parse_use_cases, qairt_form, written_use_cases
from remora_contract.use_cases import (
    USE_CASES_JSON,
    UseCaseDocument,
    load_use_cases,
    only_for_qairt,
)
from remora_contract.yaml_text import load_yaml

QAIRT = """
adapter:
- {name: long, lora_config: ../long/onnx/long.json}
- {name: elementary, lora_config: [a.json, b.json]}
attach_point_onnx_mapping: base/onnx/base_node_mapping.json
use-case:
- name: base
  adapter_names: []
  model_name: base/onnx/base.onnx
  quant_overrides: base/onnx/base.encodings
  quant_updatable_tensors: null
- name: elementary+long
  adapter_names: [elementary, long]
  adapter_alphas: [1, -0.5]
  model_name: both.onnx
  quant_overrides: {encodings: both.json, bits: [8, 16]}
- name: long
  adapter_names: [long]
"""
DIGEST = digest_bytes(b"x")


def read(text: str) -> UseCaseDocument:
    return parse_use_cases(load_yaml(text.encode(), "f.yaml"), "f.yaml")


def one(**use_case: object) -> UseCaseDocument:
    """A document of the adapters a and b with one use case u."""
    entry = {"name": "u", "adapter_names": ["a"], **use_case}
    return parse_use_cases({"adapter": [{"name": "a"}, {"name": "b"}], "use-case": [entry]}, "f")


def test_qairts_document_is_read_with_all_it_carries():
    document = read(QAIRT)
    assert [a.lora_config for a in document.adapters] == [
        "../long/onnx/long.json",
        ["a.json", "b.json"],
    ]
    assert document.attach_point_onnx_mapping == "base/onnx/base_node_mapping.json"
    assert document.release_use_cases() == (
        ReleaseUseCase("base", ()),
        ReleaseUseCase(
            "elementary+long", (WeightedName("elementary", 1.0), WeightedName("long", -0.5))
        ),
        ReleaseUseCase("long", (WeightedName("long", 1.0),)),
    )
    assert document.use_cases[1].quant_overrides == {"encodings": "both.json", "bits": [8, 16]}
    assert document.counts() == {"base": 0, "elementary+long": 2, "long": 1}


def test_what_is_written_for_qairt_says_the_same_when_it_is_read_again():
    document = read(QAIRT)
    form = qairt_form(document)
    assert list(form) == ["adapter", "attach_point_onnx_mapping", "use-case"]
    assert read(yaml.safe_dump(form)) == document
    assert form["use-case"][1]["quant_overrides"] == {"encodings": "both.json", "bits": [8, 16]}


NAMES = st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=8)
ALPHAS = st.floats(-100, 100)


@given(st.data())
def test_any_document_survives_yaml_and_json(data):
    adapters = data.draw(NAMES)
    use_cases = []
    for i in range(data.draw(st.integers(0, 3))):
        used = data.draw(st.lists(st.sampled_from(adapters), unique=True)) if adapters else []
        alphas = [data.draw(ALPHAS) for _ in used]
        name = f"u{i}" if used else ("base", "Base")[i % 2]
        use_cases.append({"name": name, "adapter_names": used, "adapter_alphas": alphas})
    names = [u["name"] for u in use_cases]
    if len(set(names)) < len(names):
        return
    raw = {"adapter": [{"name": n} for n in adapters], "use-case": use_cases}
    document = parse_use_cases(raw, "f")
    assert parse_use_cases(json.loads(canonical_json(document)), "g") == document
    dumped = yaml.safe_dump(qairt_form(document)).encode()
    assert parse_use_cases(load_yaml(dumped, "h"), "h") == document


def test_the_python_apis_spellings_mean_the_same():
    tools = one(model_name="m", quant_overrides="q")
    api = {"name": "u", "adapter_names": ["a"], "model": "m", "encodings": "q"}
    raw = {"adapters": [{"name": "a"}, {"name": "b"}], "use_cases": [api]}
    assert parse_use_cases(raw, "f") == tools


@pytest.mark.parametrize(
    ("use_case", "said"),
    [
        ({"adapter_names": ["zzz"]}, "unknown adapter zzz"),
        ({"adapter_alphas": [1.0, 2.0]}, "1 adapter_names, but 2 adapter_alphas"),
        ({"adapter_alphas": []}, "1 adapter_names, but 0 adapter_alphas"),
        ({"adapter_alphas": [float("nan")]}, r"adapter_alphas\[0\] must be a finite number"),
        ({"adapter_alphas": [10**400]}, r"adapter_alphas\[0\] must be a finite number"),
        ({"adapter_alphas": ["1"]}, r"adapter_alphas\[0\] must be a number"),
        ({"adapter_alphas": [True]}, r"adapter_alphas\[0\] must be a number"),
        ({"adapter_alphas": 1.0}, "adapter_alphas must be a list"),
        ({"adapter_alphas": [100.5]}, "within ±100"),
        ({"adapter_names": ["a", "a"]}, "names adapter a twice"),
        ({"adapter_names": ["a"] * 9}, "9 adapters; at most 8"),
        ({"adapter_names": []}, "names no adapter"),
        ({"name": "base"}, "base model alone"),
        ({"name": "a b"}, "use letters"),
        ({"name": 5}, "name must be text"),
        ({"adapter_weights": [1.0]}, "unknown key 'adapter_weights'"),
    ],
)
def test_a_use_case_that_says_nothing_sensible_is_refused_by_its_key(use_case, said):
    with pytest.raises(DocumentInvalid, match=said) as caught:
        one(**use_case)
    assert str(caught.value).startswith("f: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "must be a table"),
        ("adapter: []", "missing key 'use-case'"),
        ("use-case: []", "missing key 'adapter'"),
        ("adapter: {}\nuse-case: []", "adapter must be a list"),
        ("adapter: []\nuse-case: [3]", r"use-case\[0\]"),
        ("adapter: [{name: a}, {name: a}]\nuse-case: []", "adapter a is listed twice"),
        ("adapter: [{name: ../a}]\nuse-case: []", "adapter name"),
        ("adapter: [{name: a, rank: 4}]\nuse-case: []", r"adapter\[0\]: unknown key 'rank'"),
        ("adapter: []\nadapters: []\nuse-case: []", "says again"),
        ("adapter: []\nuse-case: []\nversion: 3", "unknown key 'version'"),
        (
            "adapter: [{name: a}]\nuse-case: [{name: u, adapter_names: [a]}, "
            "{name: u, adapter_names: [a]}]",
            "use case u is listed twice",
        ),
    ],
)
def test_a_document_is_refused_by_its_key(text, said):
    with pytest.raises(DocumentInvalid, match=said):
        read(text)


def test_more_entries_than_a_device_takes_are_refused_before_they_are_read():
    many = {"adapter": [{"name": f"a{i}"} for i in range(1025)], "use-case": []}
    with pytest.raises(DocumentInvalid, match="at most 1024"):
        parse_use_cases(many, "f")


@pytest.mark.parametrize(
    "text",
    [
        "use_case: [{name: u, model_name: m.onnx, lora_weights: w.safetensors}]",
        "use_case: [{name: u, graph: g, weights: w.safetensors, encodings: e}]",
        "features: {lora: {adapters: {}}}",
    ],
)
def test_qairts_other_documents_are_refused_by_what_they_are(text):
    with pytest.raises(Unsupported, match=r"lora_config\.yaml"):
        read(text)


def test_use_cases_beside_adapters_may_be_spelt_three_ways():
    wanted = (ReleaseUseCase("u", (WeightedName("a", 0.5), WeightedName("b", 1.0))),)
    for raw in (
        {"u": {"a": 0.5, "b": 1}},
        {"u": {"adapter_names": ["a", "b"], "adapter_alphas": [0.5, 1]}},
        [{"name": "u", "adapter_names": ["a", "b"], "adapter_alphas": [0.5, 1]}],
    ):
        assert written_use_cases(raw, "f: use_cases") == wanted
    # An adapter may be called as a key is.
    named = written_use_cases({"u": {"adapter_names": 0.5}}, "f")
    assert named == (ReleaseUseCase("u", (WeightedName("adapter_names", 0.5),)),)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (3, "f: must be a table or a list"),
        ({"u": 3}, r"f.u: document must be a table"),
        ({"u": {"a": "x"}}, r"f.u: .*must be a number"),
        ({"u": {}}, "names no adapter"),
        ({5: {"a": 1.0}}, r"f.5: document must be text"),
        ([{"adapter_names": ["a"]}], r"f\[0\]: missing key 'name'"),
        ({"u": {"name": "v", "adapter_names": ["a"]}}, "its key names the use case"),
        ({"u": {"adapter_names": ["a"], "quant_overrides": "q"}}, "quant_overrides is QAIRT's"),
    ],
)
def test_use_cases_beside_adapters_are_refused_by_their_key(raw, said):
    with pytest.raises(DocumentInvalid, match=said):
        written_use_cases(raw, "f")


def test_what_only_qairt_reads_is_named_with_its_use_cases():
    assert only_for_qairt(read(QAIRT)) == (
        "model_name of base, elementary+long",
        "quant_overrides of base, elementary+long",
    )


def converted(**changes: object) -> dict[str, object]:
    adapter = {"name": "a", "directory": "adapters/a", "digest": DIGEST}
    use_case = {"name": "u", "adapter_names": ["a"], "adapter_alphas": [1.0]}
    document = {"format_version": 1, "base_digest": DIGEST, "adapters": [adapter]}
    return {**document, "use_cases": [use_case], **changes}


def test_a_converted_document_is_loaded_from_its_directory(tmp_path: Path):
    (tmp_path / USE_CASES_JSON).write_text(json.dumps(converted()))
    for path in (tmp_path, tmp_path / USE_CASES_JSON):
        document, home = load_use_cases(path)
        assert (document.counts(), home) == ({"u": 1}, tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format_version": 2}, "format version 2 is not 1"),
        ({"base_digest": None}, "not converted"),
        ({"adapters": [{"name": "a", "digest": DIGEST}]}, "no directory or digest"),
        (
            {"adapters": [{"name": "a", "directory": "../../etc", "digest": DIGEST}]},
            "unsafe path",
        ),
        ({"adapters": [{"name": "a", "directory": "/etc", "digest": DIGEST}]}, "unsafe path"),
        ({"adapters": [{"name": "a", "directory": "a", "digest": "md5:0"}]}, "sha256"),
        ({"usecases": []}, "unknown key"),
    ],
)
def test_a_converted_document_is_not_trusted(tmp_path: Path, changes, said):
    (tmp_path / USE_CASES_JSON).write_text(json.dumps(converted(**changes)))
    with pytest.raises(DocumentInvalid, match=said):
        load_use_cases(tmp_path)


def test_a_document_that_is_not_there_or_endless_is_refused(tmp_path: Path):
    with pytest.raises(ArtifactInvalid, match="does not exist"):
        load_use_cases(tmp_path)
    (tmp_path / USE_CASES_JSON).write_bytes(b" " * ((4 << 20) + 1))
    with pytest.raises(DocumentInvalid, match="larger than"):
        load_use_cases(tmp_path)


@pytest.mark.parametrize(
    ("use_cases", "said"),
    [
        ([{"name": "u", "adapters": [{"name": "a"}, {"name": "a"}]}], "twice"),
        ([{"name": "u", "adapters": [{"name": "a", "weight": 1e4}]}], "within"),
        ([{"name": "u", "adapters": [{"name": "a"}]}] * 2, "listed twice"),
        ([{"name": "u", "adapters": []}], "names no adapter"),
    ],
)
def test_a_release_no_device_could_answer_for_is_refused_where_it_is_read(use_cases, said):
    raw = {"format_version": 1, "name": "r", "bundle": DIGEST, "use_cases": use_cases}
    raw["adapters"] = [{"name": "a", "revision": "1", "digest": DIGEST}]
    with pytest.raises(DocumentInvalid, match=said):
        parse(Release, raw, "r.json")


def test_a_release_may_name_the_base_model_and_join_names_with_plus():
    adapters = (ReleaseAdapter("a", "1", DIGEST),)
    use_cases = (ReleaseUseCase("base", ()), ReleaseUseCase("a+b", (WeightedName("a"),)))
    release = Release(1, "r", DIGEST, adapters, use_cases)
    assert parse(Release, json.loads(canonical_json(release)), "r") == release


@pytest.mark.parametrize("value", [float("nan"), {"a": float("inf")}, [[float("-inf")]], {1: 2}])
def test_a_mapping_that_could_not_be_written_again_is_refused(value: Any) -> None:
    document = {"adapter": [], "use-case": [], "attach_point_onnx_mapping": value}
    with pytest.raises(DocumentInvalid, match=r"file: attach_point_onnx_mapping"):
        parse_use_cases(document, "file")
