"""The graph that leaves of a step's logits what a token is drawn from. Pure: makes ONNX.

For every row r, in float32, of logits l [rows, vocab]:

    ids, logits      the K largest l and their token ids, largest first
    watched          l of the ids in watched_ids
    tail             sum of exp(l_i - max l) over every i outside the K largest
    tail_at          the same of exp((l_i - max l) / temperature)

Nothing is drawn or penalised here: that is the runtime's, which has the same numbers for every
engine. A NaN among the logits makes both sums NaN, an infinity the first logit or the sums: nothing
that is wrong is hidden. Only operators that TensorRT 10.3 takes.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from remora_contract.errors import Unsupported

OPSET = 20
IR_VERSION = 10
MOST_SHORTLIST = 3839  # TensorRT's TopK takes no more
INPUTS = ("logits", "watched_ids", "temperature")
OUTPUTS = ("ids", "top_logits", "watched", "tail", "tail_at")
LogitsType = Literal["float16", "float32"]
_TYPES = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}


def sampling_graph(vocab: int, shortlist: int, dtype: LogitsType = "float32") -> onnx.ModelProto:
    """Inputs logits [rows, vocab] `dtype`, watched_ids [rows, m] int64 (any valid id where a row
    watches fewer), temperature [rows, 1] float32, above 0. Outputs ids [rows, K] int32, top_logits
    [rows, K], watched [rows, m], tail [rows, 1], tail_at [rows, 1] float32; K = min(shortlist,
    vocab).

    Raises Unsupported for a shortlist that TensorRT does not take.
    """
    if not 1 <= shortlist <= MOST_SHORTLIST:
        raise Unsupported(
            f"a shortlist of {shortlist} tokens: TensorRT takes 1 to {MOST_SHORTLIST}"
        )
    kept = min(shortlist, vocab)
    graph = helper.make_graph(
        _nodes(dtype),
        "sampling",
        _inputs(vocab, dtype),
        _outputs(kept),
        [
            numpy_helper.from_array(np.array([kept], np.int64), "k"),
            numpy_helper.from_array(np.array([1], np.int64), "axes"),
            numpy_helper.from_array(np.array([[-np.inf]], np.float32), "nothing"),
        ],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def _inputs(vocab: int, dtype: LogitsType) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info("logits", _TYPES[dtype], ["rows", vocab]),
        helper.make_tensor_value_info("watched_ids", TensorProto.INT64, ["rows", "m"]),
        helper.make_tensor_value_info("temperature", TensorProto.FLOAT, ["rows", 1]),
    ]


def _outputs(kept: int) -> list[onnx.ValueInfoProto]:
    widths = (kept, kept, "m", 1, 1)
    kinds = (TensorProto.INT32, *[TensorProto.FLOAT] * 4)
    return [
        helper.make_tensor_value_info(name, kind, ["rows", width])
        for name, kind, width in zip(OUTPUTS, kinds, widths, strict=True)
    ]


def _nodes(dtype: LogitsType) -> list[onnx.NodeProto]:
    """The largest are taken out before the sums, so that what the device rounds is a share of the
    tail, not of everything."""
    cast = [] if dtype == "float32" else [_node("Cast", "logits", "l", to=TensorProto.FLOAT)]
    full = "l" if cast else "logits"
    return [
        *cast,
        _node("TopK", f"{full} k", "top_logits places", axis=1, largest=1, sorted=1),
        _node("Cast", "places", "ids", to=TensorProto.INT32),
        _node("GatherElements", f"{full} watched_ids", "watched", axis=1),
        _node("ReduceMax", "top_logits axes", "most", keepdims=1),
        _node("Shape", "top_logits", "top_shape"),
        _node("Expand", "nothing top_shape", "nothings"),
        _node("ScatterElements", f"{full} places nothings", "others", axis=1),
        _node("Sub", "others most", "below"),
        _node("Exp", "below", "weights"),
        _node("ReduceSum", "weights axes", "tail", keepdims=1),
        _node("Div", "below temperature", "below_at"),
        _node("Exp", "below_at", "weights_at"),
        _node("ReduceSum", "weights_at axes", "tail_at", keepdims=1),
    ]


def _node(operator: str, inputs: str, outputs: str, **attributes: int) -> onnx.NodeProto:
    first = outputs.split()[0]
    return helper.make_node(
        operator, inputs.split(), outputs.split(), name=f"sampling.{first}", **attributes
    )
