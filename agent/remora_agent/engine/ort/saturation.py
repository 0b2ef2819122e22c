"""Whether the 8-bit products of the installed ONNX Runtime on this processor keep large sums.

Without dot-product instructions x86 kernels add pairs of uint8 * int8 in 16 bits, where two of
255 * 127 do not fit; their uint8 * uint8 kernels are exact. The build asks instead of guessing.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

_K, _N, _M = 64, 32, 8
_LOG_FATAL = 4
_TOLERANCE = 1e-2


@cache
def signed_saturates() -> bool:
    """Of int8 weights."""
    weight = np.full((_K, _N), 127, np.int8)
    x = np.ones((_M, _K), np.float32)  # quantized to 255
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_FATAL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(_model(weight), options, ["CPUExecutionProvider"])
    (found,) = session.run(["y"], {"x": x})
    return not np.allclose(found, _K * 127.0, rtol=_TOLERANCE)


def _model(weight: np.ndarray) -> bytes:
    node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s"], ["y"], domain="com.microsoft")
    graph = helper.make_graph(
        [node],
        "saturation",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [_M, _K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [_M, _N])],
        [
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(np.ones(_N, np.float32), "s"),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return model
