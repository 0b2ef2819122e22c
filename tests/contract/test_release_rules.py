"""What no device could honour is told where a release is made, not when devices have fetched it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_agent.control.facts import BACKENDS as AGENTS
from remora_agent.runtime.api import SamplingOverrides
from remora_agent.runtime.bounds import check_sampling
from remora_contract.digests import digest_bytes
from remora_contract.errors import RequestInvalid
from remora_contract.release import Constraints, Release, SamplingDefaults
from remora_contract.release_rules import BACKENDS, document_refusals, unknown_backends
from remora_contract.sampling_bounds import LENGTHS, RANGES


def codes(sampling: SamplingDefaults | None = None, wants: Constraints | None = None) -> list[str]:
    release = Release(
        1,
        "r",
        digest_bytes(b"bundle"),
        sampling=sampling or SamplingDefaults(),
        constraints=wants or Constraints(),
    )
    return [r.code for r in document_refusals(release)]


def test_every_default_has_bounds():
    assert {*RANGES, *LENGTHS} == set(vars(SamplingDefaults()))


@given(name=st.sampled_from(sorted(RANGES)), value=st.floats(-200, 200))
def test_a_release_is_refused_exactly_where_a_request_would_be(name, value):
    value = int(value) if name == "top_k" else value
    try:
        check_sampling(SamplingOverrides(**{name: value}))
    except RequestInvalid:
        assert codes(SamplingDefaults(**{name: value})) == [f"sampling.{name}"]
    else:
        assert codes(SamplingDefaults(**{name: value})) == []


def test_all_that_is_wrong_is_told_at_once():
    sampling = SamplingDefaults(top_p=7.0, max_tokens=0, min_tokens=5)
    wants = Constraints(min_memory_bytes=-1, min_agent_version=">=0.3")
    assert codes(sampling, wants) == [
        "sampling.top_p",
        "sampling.max_tokens",
        "sampling.min_tokens",
        "constraints.min_memory_bytes",
        "constraints.min_agent_version",
    ]


@pytest.mark.parametrize("version", ["banana", "", ">=0.3", "v1"])
def test_a_least_version_that_no_version_could_be_below_is_refused(version):
    """It would have let every device pass."""
    assert codes(wants=Constraints(min_agent_version=version)) == ["constraints.min_agent_version"]


def test_a_backend_that_no_agent_has_is_a_slip_of_the_pen():
    wants = Constraints(
        backends=("tensort", "onnxruntime"),
        min_backend_versions={"ort": "1"},
        backend_versions={"trt": ">1"},
    )
    assert [r.have for r in unknown_backends(wants)] == ["ort", "tensort", "trt"]
    assert set(BACKENDS) == set(AGENTS)
