"""How far GroupQueryAttention of the installed ONNX Runtime looks with `local_window_size` = w.

Releases differ: 1.23 looks at w + 1 positions, its own included, 1.32 at w. An engine is built for
one release, so the build asks the kernel instead of guessing from a version number.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from remora_contract.errors import EngineFault

_WINDOW = 2
_TOKENS = 6
_HEAD_DIM = 16
_LOG_FATAL = 4


@cache
def window_excess() -> int:
    """Positions seen beyond `local_window_size`: 0 or 1. Raises EngineFault when it is neither."""
    values = np.zeros((1, _TOKENS, _HEAD_DIM), np.float32)
    values[0, :, 0] = 10.0 ** np.arange(_TOKENS)  # the mean of the seen ones tells which they are
    empty = np.zeros_like(values)
    cache_shape = (1, 1, _TOKENS, _HEAD_DIM)
    session = ort.InferenceSession(_model(), _options(), providers=["CPUExecutionProvider"])
    feed = {
        "query": empty,
        "key": empty,
        "value": values,
        "past_key": np.zeros(cache_shape, np.float32),
        "past_value": np.zeros(cache_shape, np.float32),
        "last": np.array([_TOKENS - 1], np.int32),
        "total": np.array(_TOKENS, np.int32),
    }
    seen = float(session.run(["out"], feed)[0][0, -1, 0])
    for excess in (0, 1):
        expected = values[0, -(_WINDOW + excess) :, 0].mean()
        if np.isclose(seen, expected, rtol=1e-4):
            return excess
    raise EngineFault(
        f"onnxruntime {ort.__version__} computes sliding windows in a way this build does not "
        "know; use another release of onnxruntime"
    )


def _model() -> bytes:
    node = helper.make_node(
        "GroupQueryAttention",
        ["query", "key", "value", "past_key", "past_value", "last", "total"],
        ["out", "present_key", "present_value"],
        domain="com.microsoft",
        num_heads=1,
        kv_num_heads=1,
        local_window_size=_WINDOW,
    )
    real, whole = TensorProto.FLOAT, TensorProto.INT32
    tokens, cached = [1, _TOKENS, _HEAD_DIM], [1, 1, _TOKENS, _HEAD_DIM]
    inputs = [(n, real, tokens) for n in ("query", "key", "value")]
    inputs += [(n, real, cached) for n in ("past_key", "past_value")]
    inputs += [("last", whole, [1]), ("total", whole, [])]
    outputs = [("out", real, tokens)]
    outputs += [(n, real, cached) for n in ("present_key", "present_value")]
    graph = helper.make_graph(
        [node],
        "window",
        [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info(*o) for o in outputs],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return model


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_FATAL
    options.intra_op_num_threads = 1
    return options
