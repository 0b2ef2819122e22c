"""Weights stored as 8-bit or 4-bit floats -> the float32 numbers they stand for: ONNX Runtime has
no product for them on a processor. docs/quantization.md says what that costs.

    fp8, mxfp8   DequantizeLinear(codes, scale)                        along columns or blocks of k
    nvfp4        DequantizeLinear(codes, DequantizeLinear(scale, global)) [-> Cast]
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from remora_agent.engine.ort.rewrite.edit import (
    Editor,
    input_of,
    integer,
    no_more_inputs,
    producer,
    refuse,
    tensor,
)

_FLOAT_CODES = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1)


def widen_float_codes(editor: Editor) -> None:
    """Rewrites every weight of such codes. Raises EngineFault on another form of scales."""
    for node in editor.nodes("DequantizeLinear"):
        codes = input_of(node, 0)
        if codes.is_initializer() and codes.dtype in _FLOAT_CODES and not _is_scale(node):
            _widen(editor, node)


def _is_scale(node: ir.Node) -> bool:
    """Whether it makes the scale of other codes."""
    return any(u.node.op_type == "DequantizeLinear" and u.idx == 1 for u in node.outputs[0].uses())


def _widen(editor: Editor, node: ir.Node) -> None:
    no_more_inputs(node, 2)
    codes, scale = tensor(node, 0), _Scale(node)
    name = f"{(input_of(node, 0).name or '').removesuffix('.q')}.widened"

    def make() -> ir.TensorProtocol:
        value, factor = np.asarray(codes.numpy()).astype(np.float32), scale.values()
        blocks = value.reshape(len(factor), -1, value.shape[1])
        wide = (blocks * factor[:, None]).reshape(value.shape)
        return ir.tensor(wide, name=name)

    shape = ir.Shape(int(d) for d in codes.shape.numpy())
    wide = editor.lazy(ir.LazyTensor(make, dtype=ir.DataType.FLOAT, shape=shape, name=name))
    result = node.outputs[0]
    after = [use.node for use in result.uses()]
    if len(after) == 1 and after[0].op_type == "Cast":  # to the graph's own float16
        result = after[0].outputs[0]
    editor.replace(result, wide)


class _Scale:
    """[rows, n] float32, one row for every block of k."""

    def __init__(self, node: ir.Node) -> None:
        k, n = (int(d) for d in tensor(node, 0).shape.numpy())
        block, axis = integer(node, "block_size", 0), integer(node, "axis", 1)
        if (axis != 0 or k % block) if block else axis != 1:
            refuse(node, "expected scales along columns, or along blocks of k")
        self._rows = k // block if block else 1
        self._whole: ir.TensorProtocol | None = None
        if input_of(node, 1).is_initializer():
            self._scale = tensor(node, 1)
        else:
            inner = producer(input_of(node, 1), "DequantizeLinear", node)
            no_more_inputs(inner, 2)
            self._scale, self._whole = tensor(inner, 0), tensor(inner, 1)
        found = tuple(int(d) for d in self._scale.shape.numpy())
        if found not in ((self._rows, n), (n,)):
            refuse(node, f"expected scales of shape {[self._rows, n]}, found {list(found)}")

    def values(self) -> NDArray[np.float32]:
        scale = np.asarray(self._scale.numpy()).astype(np.float32).reshape(self._rows, -1)
        if self._whole is None:
            return scale
        return scale * np.asarray(self._whole.numpy()).astype(np.float32).reshape(-1)
