"""DequantizeLinear(int4 or int8) + MatMul [+ offset] [+ Add bias] -> MatMulNBits.

Portable: signed codes [k, n], scales [k / block, n] or, of int8, [n].  MatMulNBits: unsigned codes
with the zero point in the middle as [n, k / block, block * bits / 8], scales [n, k / block].

int4 with zero points is in the portable graph x W + sums(x) offset, offset = (8 - zero) * scale;
here zero goes back to the codes. The product of a rounded input keeps float32, so that nothing is
rounded twice.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from remora_agent.engine.ort.rewrite.edit import (
    MICROSOFT,
    Editor,
    input_of,
    integer,
    no_more_inputs,
    only_user,
    refuse,
    tensor,
)
from remora_agent.engine.ort.rewrite.offsets import take_offset, zero_points

_COLUMNS_AT_ONCE = 4096
_BLOCKS = (16, 32, 64, 128, 256)
_COLUMN_BLOCKS = (32, 64, 128)
_FLOAT32_PRODUCT = 1  # accuracy_level


def fuse_integers(editor: Editor, accuracy_level: int) -> None:
    """Rewrites every weight of integers. Raises EngineFault on another kind of quantization."""
    for node in editor.nodes("DequantizeLinear"):
        if input_of(node, 0).is_initializer():  # else it is an input's rounding
            _fuse(editor, node, accuracy_level)


def _fuse(editor: Editor, dequantize: ir.Node, accuracy_level: int) -> None:
    no_more_inputs(dequantize, 2)
    stem = (input_of(dequantize, 0).name or "").removesuffix(".q")
    product = only_user(dequantize.outputs[0], "MatMul", dequantize)
    if input_of(product, 1) is not dequantize.outputs[0]:
        refuse(product, "expected the quantized weight on the right")
    quantized = tensor(dequantize, 0)
    k, n = (int(d) for d in quantized.shape.numpy())
    bits, block = _form(dequantize, k, n)
    if bits == 4:
        packed = _packed(quantized, k, n, block, f"{stem}.nbits")
    else:
        packed = _packed_bytes(quantized, k, n, block, f"{stem}.nbits")
    scales = _scales(tensor(dequantize, 1), -(-k // block), n, f"{stem}.scales")
    inputs: list[ir.Value | None] = [
        input_of(product, 0),
        editor.lazy(packed),
        editor.lazy(scales),
    ]
    offset, value = take_offset(product)
    bias, result = _bias(value)
    if offset is not None:
        inputs.append(editor.initializer(zero_points(offset, scales), f"{stem}.zeros"))
    if bias is not None:
        name = f"{bias.name}.widened"
        assert bias.const_value is not None  # _bias looked
        bias32 = np.asarray(bias.const_value.numpy()).astype(np.float32)
        inputs += [*[None] * (5 - len(inputs)), editor.initializer(bias32, name)]
    attributes = {"K": k, "N": n, "bits": bits, "block_size": block}
    attributes["accuracy_level"] = _FLOAT32_PRODUCT if _is_rounded(product) else accuracy_level
    (fused,) = editor.emit(
        "MatMulNBits", inputs, f"{product.name}.int{bits}", domain=MICROSOFT, attributes=attributes
    )
    editor.replace(result, fused)


def _form(dequantize: ir.Node, k: int, n: int) -> tuple[int, int]:
    """(bits, block of MatMulNBits). Raises EngineFault."""
    dtype, block = tensor(dequantize, 0).dtype, integer(dequantize, "block_size", 0)
    found = tuple(int(d) for d in tensor(dequantize, 1).shape.numpy())
    if dtype not in (ir.DataType.INT4, ir.DataType.INT8):
        refuse(dequantize, "expected signed int4 or int8")
    if dtype == ir.DataType.INT8 and not block:
        if integer(dequantize, "axis", 1) != 1 or found != (n,):
            refuse(dequantize, "expected one scale per column")
        return 8, next((b for b in reversed(_COLUMN_BLOCKS) if k % b == 0), _COLUMN_BLOCKS[0])
    wanted = (k // block, n) if block in _BLOCKS and k % block == 0 else None
    if integer(dequantize, "axis", 1) != 0 or found != wanted:
        refuse(dequantize, f"expected one scale per block of {_BLOCKS} along axis 0")
    return 4 if dtype == ir.DataType.INT4 else 8, block


def _is_rounded(product: ir.Node) -> bool:
    source = input_of(product, 0).producer()
    return source is not None and source.op_type == "DequantizeLinear"


def _bias(value: ir.Value) -> tuple[ir.Value | None, ir.Value]:
    """The constant added right after the product, and the value that then stands for both."""
    uses = tuple(value.uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add":
        other = input_of(uses[0].node, 1 - uses[0].idx)
        if other.is_initializer() and other.const_value is not None:
            return other, uses[0].node.outputs[0]
    return None, value


def _packed_bytes(
    source: ir.TensorProtocol, k: int, n: int, block: int, name: str
) -> ir.LazyTensor:
    """int8 [k, n] -> [n, blocks, block]; what fills up the last block is zero."""
    blocks = -(-k // block)

    def make() -> ir.TensorProtocol:
        packed = np.full((n, blocks * block), 0x80, np.uint8)
        packed[:, :k] = (np.asarray(source.numpy()).view(np.uint8) ^ 0x80).T
        return ir.tensor(packed.reshape(n, blocks, block), name=name)

    shape = ir.Shape([n, blocks, block])
    return ir.LazyTensor(make, dtype=ir.DataType.UINT8, shape=shape, name=name)


def _packed(source: ir.TensorProtocol, k: int, n: int, block: int, name: str) -> ir.LazyTensor:
    def make() -> ir.TensorProtocol:
        packed = np.empty((n, k // block, block // 2), np.uint8)
        for begin, columns in nibble_columns(source.tobytes(), k, n):
            packed[begin : begin + columns.shape[1]] = _pack(columns).reshape(
                -1, k // block, block // 2
            )
        return ir.tensor(packed, name=name)

    shape = ir.Shape([n, k // block, block // 2])
    return ir.LazyTensor(make, dtype=ir.DataType.UINT8, shape=shape, name=name)


def nibble_columns(data: bytes, k: int, n: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(first column, two's complement nibbles [k, some columns]) of a packed int4 [k, n].

    A bounded number of columns at a time: the largest weight is the vocabulary's.
    """
    raw = np.frombuffer(data, np.uint8)
    if n % 2:  # rows do not begin at whole bytes
        yield 0, _interleave(raw)[: k * n].reshape(k, n)
        return
    rows = raw.reshape(k, n // 2)
    for begin in range(0, n, _COLUMNS_AT_ONCE):
        yield begin, _interleave(rows[:, begin // 2 : (begin + _COLUMNS_AT_ONCE) // 2])


def _interleave(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bytes [..., m] -> nibbles [..., 2m], the low one first."""
    pairs = np.stack([packed & 0xF, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1)


def _pack(nibbles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Signed nibbles [k, c] -> bytes [c, k / 2] of unsigned nibbles with zero point 8."""
    # Adding 8 modulo 16 flips the top bit of a two's complement nibble.
    shifted = np.ascontiguousarray((nibbles ^ 8).T)
    packed: NDArray[np.uint8] = shifted[:, 0::2] | (shifted[:, 1::2] << 4)
    return packed


def _scales(source: ir.TensorProtocol, blocks: int, n: int, name: str) -> ir.LazyTensor:
    """[blocks, n] or, the same for all blocks, [n] -> [n, blocks]."""

    def make() -> ir.TensorProtocol:
        wide = np.broadcast_to(np.asarray(source.numpy()).astype(np.float32), (blocks, n))
        return ir.tensor(np.ascontiguousarray(wide.T), name=name)

    return ir.LazyTensor(make, dtype=ir.DataType.FLOAT, shape=ir.Shape([n, blocks]), name=name)
