"""Names of backends."""

from __future__ import annotations

import pytest

from remora_agent.engine.backends import BACKENDS, check_backend
from remora_contract.errors import RequestInvalid


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_is_known_by_its_name(name: str):
    assert check_backend(name) == name


@pytest.mark.parametrize("name", ["", "TensorRT", "trt", "onnxruntime "])
def test_another_name_is_refused_with_those_there_are(name: str):
    with pytest.raises(RequestInvalid, match="onnxruntime, tensorrt, tensorrt_rtx"):
        check_backend(name)


def test_what_was_planned_is_refused_with_what_to_do_instead():
    with pytest.raises(RequestInvalid, match=r"no backend edgellm.*remora-build export"):
        check_backend("edgellm")
