"""What a release asks of a device, judged the same by controller and device."""

from __future__ import annotations

import pytest

from remora_agent.engine.recipe import GpuBuild
from remora_contract.compat import constraint_refusals
from remora_contract.engine import PROCESSORS, flat
from remora_contract.errors import Refusal
from remora_contract.release import Constraints
from remora_contract.strict import plain


def codes(wants: Constraints, **have: object) -> list[str]:
    return [r.code for r in refusals(wants, **have)]


def refusals(wants: Constraints, **have: object) -> list[Refusal]:
    facts = {
        "memory_bytes": 8 << 30,
        "disk_free_bytes": 4 << 30,
        "agent_version": "0.12.1",
        "backends": {"onnxruntime": "1.20.1"},
        "engine_key": {"backend": "onnxruntime"},
    }
    return constraint_refusals(wants, **{**facts, **have})


@pytest.mark.parametrize(
    ("have", "need", "refused"),
    [
        ("0.12.1", "0.12.1", False),
        ("0.12.1", "0.9", False),
        ("0.9.9", "0.10", True),
        ("0.12.1rc1", "0.12.2", True),
        ("0.13.0.dev3", "0.13.1", True),
        ("", "0.1", True),
    ],
)
def test_versions_are_compared_by_their_leading_numbers(have, need, refused):
    assert bool(codes(Constraints(min_agent_version=need), agent_version=have)) is refused


def test_all_refusals_come_at_once():
    wants = Constraints(16 << 30, "99.0", ("tensorrt",))
    assert codes(wants) == ["agent_version", "backend", "memory"]
    assert codes(Constraints()) == []


@pytest.mark.parametrize(
    ("need", "have", "refused"),
    [
        ({"onnxruntime": "1.20"}, {"onnxruntime": "1.20.1"}, False),
        ({"onnxruntime": "1.21"}, {"onnxruntime": "1.20.1"}, True),
        ({"tensorrt": "10.3"}, {"onnxruntime": "1.32"}, True),
        ({"tensorrt": "10.3"}, {"tensorrt": ""}, True),
        (
            {"tensorrt": "10.3", "onnxruntime": "1.9"},
            {"tensorrt": "8", "onnxruntime": "1.9"},
            False,
        ),
    ],
)
def test_one_backend_that_is_new_enough_will_do(need, have, refused):
    assert bool(codes(Constraints(min_backend_versions=need), backends=have)) is refused


@pytest.mark.parametrize(
    ("free", "refused"), [(1 << 30, True), (2 << 30, False), (0, True), (None, False)]
)
def test_free_disk_is_wanted_where_something_is_fetched(free, refused):
    assert bool(codes(Constraints(min_disk_free_bytes=2 << 30), disk_free_bytes=free)) is refused


def test_what_a_device_does_not_tell_is_refused_and_named():
    wants = Constraints(1, "0.1", (), 1, agent_version=">=0.1", backend_versions={"tensorrt": "<9"})
    unknown = {"memory_bytes": 0, "disk_free_bytes": 0, "agent_version": ""}
    found = refusals(wants, **unknown, backends={"tensorrt": ""})
    assert [(r.code, "unknown" in r.have) for r in found] == [
        ("agent_version", True),
        ("agent_version", True),
        ("backend_version", True),
        ("disk", True),
        ("memory", True),
    ]


@pytest.mark.parametrize(
    ("need", "have", "refused"),
    [
        (">=0.12", "0.12.1", False),
        (">=0.3,<0.12", "0.12.1", True),
        (">=0.13", "0.13.0.dev3", True),
        (">=0.12", "0.13.0rc1", False),
        ("==0.12.*", "0.12.1", False),
        ("~=0.12.0", "0.13.0", True),
        (">=0.1", "built by hand", True),
    ],
)
def test_an_agent_is_wanted_by_a_range_of_versions(need, have, refused):
    assert bool(codes(Constraints(agent_version=need), agent_version=have)) is refused


@pytest.mark.parametrize("text", ["", "0.3", "newest", ">=", ">=0.3;<0.4", ">=1," * 99 + ">=1"])
def test_what_is_no_range_of_versions_is_refused(text):
    with pytest.raises(ValueError, match="no range of versions"):
        Constraints(agent_version=text)
    with pytest.raises(ValueError, match="no range of versions"):
        Constraints(backend_versions={"tensorrt": text})


def test_one_backend_in_range_will_do():
    wants = Constraints(backend_versions={"tensorrt": ">=10.3,<11", "onnxruntime": ">=1.20"})
    assert codes(wants, backends={"tensorrt": "10.3.0.26"}) == []
    assert codes(wants, backends={"tensorrt": "11.0", "onnxruntime": "1.32"}) == []
    assert codes(wants, backends={"tensorrt": "11.0"}) == ["backend_version"]


@pytest.mark.parametrize(
    ("need", "key", "refused"),
    [
        ((86, 87), {"gpu.processors": "87"}, False),
        ((86,), {"gpu.processors": "87"}, True),
        ((8,), {"gpu.processors": "87"}, None),
        ((87,), {"backend": "onnxruntime"}, True),
        ((87,), {}, True),
    ],
)
def test_a_gpu_is_wanted_by_its_compute_capability(need, key, refused):
    if refused is None:
        with pytest.raises(ValueError, match="without the dot"):
            Constraints(sm=need)
    else:
        assert codes(Constraints(sm=need), engine_key=key) == (["sm"] if refused else [])


def test_no_gpu_at_all_is_not_what_a_list_of_none_means():
    with pytest.raises(ValueError, match="without the dot"):
        Constraints(sm=())


def test_the_key_that_is_looked_at_is_the_agents():
    build = GpuBuild(processors=(87,), rows=4, prefill_tokens=256)
    assert flat({"gpu": build})[PROCESSORS] == "87"


def test_a_release_without_the_newer_constraints_is_the_document_it_was():
    assert plain(Constraints()) == {"backends": []}


def test_a_version_that_is_none_is_refused():
    with pytest.raises(ValueError, match="no version of tensorrt"):
        Constraints(min_backend_versions={"tensorrt": "newest"})
