"""Which dialect goes where, judged the same by controller, device and documentation."""

from __future__ import annotations

import pytest

from remora_contract.dialects import (
    JETPACKS,
    SUPPORT,
    dialect_refusals,
    dialects_in,
    dialects_of,
    dialects_of_jetpack,
    to_build,
)
from scripts.dialect_reference import PAGE, page_with_tables


@pytest.mark.parametrize(
    ("backend", "version", "dialects"),
    [
        ("tensorrt", "10.0.1", ()),
        ("tensorrt", "10.3.0", ("legacy",)),
        ("tensorrt", "10.13.3.9", ("legacy",)),
        ("tensorrt", "10.15", ("native", "legacy")),
        ("tensorrt", "10.16.1.11", ("native", "legacy")),
        ("tensorrt", "11.4.0.106", ("native", "legacy")),
        ("tensorrt_rtx", "1.6.1", ()),
        ("tensorrt_rtx", "1.7.1.116", ("native", "legacy")),
        ("onnxruntime", "1.23.2", ("native", "legacy")),
        ("onnxruntime", "1.9", ()),
        ("tensorrt", "", ()),
        ("tensorrt", "unknown", ()),
        ("openvino", "2026.1", ()),
    ],
)
def test_versions_decide_the_dialects_of_a_backend(backend, version, dialects):
    assert dialects_of(backend, version) == dialects


@pytest.mark.parametrize(
    ("jetpack", "dialects"),
    [
        ("6.2", ("legacy",)),
        ("6.2.1", ("legacy",)),
        ("7.1", ("legacy",)),
        ("7.2", ("native", "legacy")),
        ("5.1", ()),
    ],
)
def test_a_jetpack_takes_what_its_tensorrt_takes(jetpack, dialects):
    assert dialects_of_jetpack(jetpack) == dialects


def test_one_backend_that_takes_the_dialect_is_enough():
    backends = {"tensorrt_rtx": "1.7.1", "tensorrt": "10.3.0"}
    assert dialect_refusals(["legacy"], backends) == []
    assert dialect_refusals(["native"], backends) == []


def test_a_refusal_says_what_would_take_the_graph_and_what_is_there():
    (refusal,) = dialect_refusals(["native"], {"tensorrt": "10.3.0"})
    assert refusal.code == "dialect"
    assert refusal.need.startswith("tensorrt >= 10.15 or ")
    assert refusal.have == "tensorrt 10.3.0"
    (refusal,) = dialect_refusals(["legacy"], {"onnxruntime": "1.9.0"})
    assert "tensorrt >= 10.3" in refusal.need


def test_a_device_that_told_nothing_is_not_refused():
    assert dialect_refusals(["native"], {}) == []


def test_every_jetpack_has_a_dialect_and_rows_of_a_backend_rise():
    assert all(dialects_of_jetpack(j.version) for j in JETPACKS)
    for backend in {s.backend for s in SUPPORT}:
        since = [s.since for s in SUPPORT if s.backend == backend]
        assert since == sorted(set(since))


def test_the_page_has_the_tables_of_the_code():
    text = PAGE.read_text()
    assert page_with_tables(text) == text, "run python scripts/dialect_reference.py"


BOTH = ("native", "legacy")


@pytest.mark.parametrize(
    ("backend", "version", "built"),
    [
        ("tensorrt", "10.3.0", ("legacy",)),
        ("tensorrt", "10.16.1", ("native", "legacy")),
        ("tensorrt_rtx", "1.7.1", ("native", "legacy")),
        ("onnxruntime", "1.23.2", ("native",)),
        ("tensorrt", "10.0", ()),
    ],
)
def test_of_two_graphs_a_device_builds_what_its_version_takes_and_the_other_as_a_way_out(
    backend, version, built
):
    assert to_build(BOTH, backend, version) == built
    assert (dialect_refusals(BOTH, {backend: version}) == []) == bool(built)
    for only in BOTH:
        assert to_build([only], backend, version) in ((only,), ())


@pytest.mark.parametrize(
    ("facts", "dialects"),
    [
        ({"dialect": "native"}, ("native",)),
        ({"dialect": "native", "dialects": ["native", "legacy"]}, BOTH),
        ({}, ()),
        ({"dialect": "later"}, ()),
        ({"dialects": "native"}, ()),
        ({"dialects": ["later", "legacy", 7]}, ("legacy",)),
    ],
)
def test_a_manifest_tells_the_dialects_of_its_graphs(facts, dialects):
    assert dialects_in(facts) == dialects
