"""DequantizeLinear(int4) + MatMul [+ Add bias] -> MatMulNBits.

Portable: signed int4 [k, n], scales [k / block, n].  MatMulNBits: unsigned nibbles with zero point
8 as [n, k / block, block / 2], scales [n, k / block].
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

_COLUMNS_AT_ONCE = 4096
_BLOCKS = (16, 32, 64, 128, 256)


def fuse_int4(editor: Editor, accuracy_level: int) -> None:
    """Rewrites every DequantizeLinear. Raises EngineFault on another kind of quantization."""
    for node in editor.nodes("DequantizeLinear"):
        _fuse(editor, node, accuracy_level)


def _fuse(editor: Editor, dequantize: ir.Node, accuracy_level: int) -> None:
    no_more_inputs(dequantize, 2)
    quantized, scale = tensor(dequantize, 0), tensor(dequantize, 1)
    block = integer(dequantize, "block_size", 0)
    if quantized.dtype != ir.DataType.INT4 or integer(dequantize, "axis", 1) != 0:
        refuse(dequantize, "expected signed int4 quantized along axis 0")
    k, n = (int(d) for d in quantized.shape.numpy())
    if block not in _BLOCKS or k % block or tuple(scale.shape.numpy()) != (k // block, n):
        refuse(dequantize, f"expected one scale per block of {_BLOCKS} along k")
    product = only_user(dequantize.outputs[0], "MatMul", dequantize)
    if input_of(product, 1) is not dequantize.outputs[0]:
        refuse(product, "expected the quantized weight on the right")
    stem = (input_of(dequantize, 0).name or "").removesuffix(".q")
    bias, result = _bias(product)
    inputs: list[ir.Value | None] = [
        input_of(product, 0),
        editor.lazy(_packed(quantized, k, n, block, f"{stem}.nbits")),
        editor.lazy(_scales(scale, f"{stem}.scales")),
    ]
    if bias is not None:
        name = f"{bias.name}.widened"
        assert bias.const_value is not None  # _bias looked
        bias32 = np.asarray(bias.const_value.numpy()).astype(np.float32)
        inputs += [None, None, editor.initializer(bias32, name)]
    (fused,) = editor.emit(
        "MatMulNBits",
        inputs,
        f"{product.name}.int4",
        domain=MICROSOFT,
        attributes={
            "K": k,
            "N": n,
            "bits": 4,
            "block_size": block,
            "accuracy_level": accuracy_level,
        },
    )
    editor.replace(result, fused)


def _bias(product: ir.Node) -> tuple[ir.Value | None, ir.Value]:
    """The constant added right after the product, and the value that then stands for both."""
    uses = tuple(product.outputs[0].uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add":
        other = input_of(uses[0].node, 1 - uses[0].idx)
        if other.is_initializer() and other.const_value is not None:
            return other, uses[0].node.outputs[0]
    return None, product.outputs[0]


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


def _scales(source: ir.TensorProtocol, name: str) -> ir.LazyTensor:
    blocks, n = (int(d) for d in source.shape.numpy())

    def make() -> ir.TensorProtocol:
        turned = np.ascontiguousarray(np.asarray(source.numpy()).astype(np.float32).T)
        return ir.tensor(turned, name=name)

    return ir.LazyTensor(make, dtype=ir.DataType.FLOAT, shape=ir.Shape([n, blocks]), name=name)
