"""Zero points of int4 weights: in the portable graph a product of its own, in MatMulNBits an input.

x W + ReduceSum(Reshape(x, [..., k / block, block]), -1) offset        offset = (8 - zero) * scale
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from remora_agent.engine.ort.rewrite.edit import input_of, only_user, producer, refuse

_MIDDLE = 8


def take_offset(product: ir.Node) -> tuple[ir.TensorProtocol | None, ir.Value]:
    """The offset [k / block, n] added to a product, and the value that stands for the sum.

    Raises EngineFault when what is added is made otherwise.
    """
    uses = tuple(product.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add":
        return None, product.outputs[0]
    add = uses[0].node
    extra = input_of(add, 1 - uses[0].idx).producer()
    sums = None if extra is None or extra.op_type != "MatMul" else input_of(extra, 0).producer()
    if extra is None or sums is None or sums.op_type != "ReduceSum":
        return None, product.outputs[0]
    split = producer(input_of(sums, 0), "Reshape", sums)
    if input_of(split, 0) is not input_of(product, 0):
        refuse(add, "expected the sums of the product's own input")
    only_user(extra.outputs[0], "Add", extra)
    offset = input_of(extra, 1)
    if not offset.is_initializer() or offset.const_value is None:
        refuse(extra, "expected constant offsets")
    return offset.const_value, add.outputs[0]


def zero_points(offset: ir.TensorProtocol, scales: ir.TensorProtocol) -> NDArray[np.uint8]:
    """[n * ceil(blocks / 2)]: two nibbles a byte, the first block in the low one."""
    wide = np.asarray(offset.numpy()).astype(np.float32).T
    zeros = _MIDDLE - np.rint(wide / np.asarray(scales.numpy())).astype(np.int8)
    if zeros.shape[1] % 2:
        zeros = np.pad(zeros, ((0, 0), (0, 1)))
    packed: NDArray[np.uint8] = (zeros[:, 0::2] | (zeros[:, 1::2] << 4)).astype(np.uint8)
    return packed.reshape(-1)
