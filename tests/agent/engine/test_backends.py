"""Names of backends."""

from __future__ import annotations

import pytest

from remora_agent.engine.backends import BACKENDS, check_backend, check_stepped, check_tensorrt
from remora_contract.errors import RequestInvalid


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_is_known_by_its_name(name: str):
    assert check_backend(name) == name


@pytest.mark.parametrize("name", ["", "TensorRT", "trt", "onnxruntime "])
def test_another_name_is_refused_with_those_there_are(name: str):
    with pytest.raises(RequestInvalid, match="onnxruntime, tensorrt, tensorrt_rtx, edgellm"):
        check_backend(name)


@pytest.mark.parametrize("check", [check_stepped, check_tensorrt])
def test_a_backend_without_engines_of_ours_is_not_asked_for_steps(check):
    with pytest.raises(RequestInvalid, match="edgellm"):
        check("edgellm")
