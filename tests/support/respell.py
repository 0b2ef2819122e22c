"""One decoder, its projections spelled as other exporters spell them.

    model = onnx.load(torchscript_export(...))
    plain = respell(model, RUNNABLE["int4_blocks"])

A spelling replaces `y = MatMul(x, W)` by nodes that compute the same (or a quantized) y from the
same x. `plain` says for each projection which values x and y are, so that tests know the truth
without asking the code under test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper

from remora_contract.targets import AdapterTarget
from tests.support.foreign import projections

BLOCK = 16


@dataclass(frozen=True)
class Plain:
    """A projection's truth: x [.., k] before anything a quantizer put there, y [.., n]."""

    x: str
    y: str
    k: int
    n: int


class Scribe:
    """Writes the nodes of one projection; initializers are named after `stem`."""

    def __init__(self, model: onnx.ModelProto, stem: str, x: str, weight: np.ndarray) -> None:
        self.model = model
        self.stem = stem
        self.x = x
        self.weight = weight  # [k, n] float32
        self.nodes: list[onnx.NodeProto] = []

    def const(self, word: str, array: np.ndarray) -> str:
        name = f"{self.stem}.{word}"
        self.model.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def typed(self, word: str, kind: int, array: np.ndarray) -> str:
        """An initializer of a type that numpy lacks."""
        name = f"{self.stem}.{word}"
        tensor = helper.make_tensor(name, kind, array.shape, array.astype(np.float32).ravel())
        self.model.graph.initializer.append(tensor)
        return name

    def node(
        self, op: str, inputs: Sequence[str], outputs: int = 1, domain: str = "", **attributes: Any
    ) -> str:
        at = f"{self.stem}/{op}_{len(self.nodes)}"
        made = [at if i == 0 else f"{at}:{i}" for i in range(outputs)]
        node = helper.make_node(op, inputs, made, name=at, domain=domain, **attributes)
        self.nodes.append(node)
        return at


Spelling = Callable[[Scribe], str]


def respell(model: onnx.ModelProto, spelling: Spelling) -> dict[AdapterTarget, Plain]:
    """Changes `model` in place; every projection is spelled anew."""
    found = projections(model)
    weights = {t.name: t for t in model.graph.initializer}
    plain: dict[AdapterTarget, Plain] = {}
    replaced: dict[str, list[onnx.NodeProto]] = {}
    for target, node in found.items():
        stored = numpy_helper.to_array(weights[node.input[1]])
        scribe = Scribe(model, node.name.rpartition("/")[0].strip("/"), node.input[0], stored)
        y = spelling(scribe)
        scribe.nodes.append(helper.make_node("Identity", [y], [node.output[0]]))
        plain[target] = Plain(node.input[0], y, *stored.shape)
        replaced[node.name] = scribe.nodes
    old = list(model.graph.node)
    del model.graph.node[:]
    for node in old:
        model.graph.node.extend(replaced.get(node.name, [node]))
    _drop_unused(model)
    _set_opsets(model)
    return plain


def add_deltas(
    model: onnx.ModelProto,
    plain: dict[AdapterTarget, Plain],
    deltas: dict[AdapterTarget, np.ndarray],
) -> None:
    """The reference: y + x D, D [rows, k, n] stored, written by hand at the true x [rows, s, k]."""
    makers = {v: i for i, n in enumerate(model.graph.node) for v in n.output}
    extra: dict[int, list[onnx.NodeProto]] = {}
    for target, delta in deltas.items():
        point = plain[target]
        name, maker = f"delta.{target.name()}", makers[point.y]
        model.graph.initializer.append(numpy_helper.from_array(delta.astype(np.float32), name))
        node = model.graph.node[maker]
        node.output[:] = [f"{name}.base" if v == point.y else v for v in node.output]
        extra[maker] = [
            helper.make_node("MatMul", [point.x, name], [f"{name}.x"]),
            helper.make_node("Add", [f"{name}.base", f"{name}.x"], [point.y]),
        ]
    old = list(model.graph.node)
    del model.graph.node[:]
    for i, node in enumerate(old):
        model.graph.node.extend([node, *extra.get(i, [])])


def strip_names(model: onnx.ModelProto) -> None:
    """Leaves of names what optimizers leave: numbers."""
    graph = model.graph
    kept = {v.name for v in (*graph.input, *graph.output)} | {""}
    made = [v for n in graph.node for v in n.output if v not in kept]
    new = {name: f"v{i}" for i, name in enumerate([t.name for t in graph.initializer] + made)}
    for tensor in graph.initializer:
        tensor.name = new[tensor.name]
    for i, node in enumerate(graph.node):
        node.name = f"node_{i}"
        node.input[:] = [new.get(v, v) for v in node.input]
        node.output[:] = [new.get(v, v) for v in node.output]
    del graph.value_info[:]


def _drop_unused(model: onnx.ModelProto) -> None:
    used = {v for n in model.graph.node for v in n.input}
    kept = [t for t in model.graph.initializer if t.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _set_opsets(model: onnx.ModelProto) -> None:
    """As new as the spellings need: block-wise DequantizeLinear is of 21, FP4 of 23."""
    domains = {n.domain for n in model.graph.node if n.domain}
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", 23))
    model.opset_import.extend(helper.make_opsetid(d, 1) for d in sorted(domains))
    model.ir_version = 11


# ---- weights stored plainly -------------------------------------------------------------------


def transposed(s: Scribe) -> str:
    return s.node("MatMul", [s.x, s.node("Transpose", [s.const("weight", s.weight.T.copy())])])


def reshaped_and_cast(s: Scribe) -> str:
    """W flat, in doubles."""
    shape = s.const("shape", np.array(s.weight.shape, np.int64))
    flat = s.const("weight", s.weight.astype(np.float64).ravel())
    wide = s.node("Reshape", [flat, shape])
    return s.node("MatMul", [s.x, s.node("Cast", [wide], to=1)])


def _flat(s: Scribe, x: str) -> str:
    return s.node("Reshape", [x, s.const("flat", np.array([-1, s.weight.shape[0]], np.int64))])


def _unflat(s: Scribe, y: str) -> str:
    """y [m, n] to [rows, s, n] by the shape of x."""
    size = s.node("Shape", [s.x], start=0, end=2)
    n = s.const("width", np.array([s.weight.shape[1]], np.int64))
    return s.node("Reshape", [y, s.node("Concat", [size, n], axis=0)])


def gemm(s: Scribe) -> str:
    """torch's Linear on [rows * s, k]: W is [n, k]."""
    weight = s.const("weight", s.weight.T.copy())
    return _unflat(s, s.node("Gemm", [_flat(s, s.x), weight], transB=1))


# ---- weights quantized ------------------------------------------------------------------------


def _int8(weight: np.ndarray, axis: int | None) -> tuple[np.ndarray, np.ndarray]:
    scale = np.abs(weight).max(axis) / 127
    codes = np.round(weight / (np.expand_dims(scale, axis) if axis is not None else scale))
    return codes.astype(np.int8), scale.astype(np.float32)


def int8_channels(s: Scribe) -> str:
    codes, scale = _int8(s.weight, axis=0)
    inputs = [s.const("weight_q", codes), s.const("weight_scale", scale)]
    return s.node("MatMul", [s.x, s.node("DequantizeLinear", inputs, axis=1)])


def _blocks(weight: np.ndarray, most: float) -> tuple[np.ndarray, np.ndarray]:
    """[k, n] -> codes [k, n] within most, scales [k / BLOCK, n]"""
    k, n = weight.shape
    scale = np.abs(weight.reshape(k // BLOCK, BLOCK, n)).max(1) / most
    return weight / np.repeat(scale, BLOCK, 0), scale.astype(np.float32)


def int4_blocks(s: Scribe) -> str:
    codes, scale = _blocks(s.weight, 7)
    stored = s.const("weight_q", np.round(codes).astype(ml_dtypes.int4))
    inputs = [stored, s.const("weight_scale", scale)]
    return s.node("MatMul", [s.x, s.node("DequantizeLinear", inputs, axis=0, block_size=BLOCK)])


def matmul_nbits(s: Scribe) -> str:
    return _nbits(s, s.x, s.weight)


def _nbits(s: Scribe, x: str, weight: np.ndarray) -> str:
    """com.microsoft: two codes a byte, [n, blocks, BLOCK / 2], zero at 8."""
    k, n = weight.shape
    codes, scale = _blocks(weight, 7)
    nibbles = (np.round(codes).astype(np.int64) + 8).T.reshape(n, k // BLOCK, BLOCK // 2, 2)
    packed = (nibbles[..., 0] | nibbles[..., 1] << 4).astype(np.uint8)
    inputs = [x, s.const("weight_Q4", packed), s.const("weight_scales", scale.T.copy())]
    sizes = {"K": k, "N": n, "bits": 4, "block_size": BLOCK}
    return s.node("MatMulNBits", inputs, domain="com.microsoft", **sizes)


# ---- activations quantized, scaled, reordered -------------------------------------------------


def _qdq(s: Scribe, x: str, word: str, zero: np.ndarray) -> str:
    inputs = [s.const(f"{word}_scale", np.float32(0.05)), s.const(f"{word}_zero", zero)]
    return s.node("DequantizeLinear", [s.node("QuantizeLinear", [x, *inputs]), *inputs])


def int8_qdq(s: Scribe) -> str:
    """Activation, weight and result: what a static quantizer writes."""
    codes, scale = _int8(s.weight, axis=None)
    weight = [s.const("weight_q", codes), s.const("weight_scale", scale)]
    zero = np.int8(0)
    y = s.node("MatMul", [_qdq(s, s.x, "input", zero), s.node("DequantizeLinear", weight)])
    return _qdq(s, y, "output", zero)


def _channel_scale(s: Scribe) -> np.ndarray:
    rng = np.random.default_rng(s.weight.shape[0])
    return rng.uniform(0.1, 4, s.weight.shape[0]).astype(np.float32)


def smoothquant(s: Scribe) -> str:
    """x * s, quantized; W / s, in the [n, k] of TensorRT Edge-LLM."""
    scale = _channel_scale(s)
    smooth = s.node("Mul", [s.x, s.const("pre_quant_scale", scale)])
    codes, weight_scale = _int8((s.weight / scale[:, None]).T.copy(), axis=1)
    weight = [s.const("weight", codes), s.const("weight_scale", weight_scale)]
    matrix = s.node("Transpose", [s.node("DequantizeLinear", weight, axis=0)])
    return s.node("MatMul", [_qdq(s, smooth, "input", np.int8(0)), matrix])


def awq(s: Scribe) -> str:
    """x / s with a name that says nothing, before packed weights."""
    scale = _channel_scale(s)
    inverse = s.const("val", scale[None, None, :])
    return _nbits(s, s.node("Div", [s.x, inverse]), s.weight * scale[:, None])


def gptq(s: Scribe) -> str:
    """act-order: x and the rows of W in the order in which they were quantized."""
    order = np.random.default_rng(s.weight.shape[0]).permutation(s.weight.shape[0])
    shuffled = s.node("Gather", [s.x, s.const("order", order)], axis=-1)
    return _nbits(s, shuffled, s.weight[order])


def dynamic_int8(s: Scribe) -> str:
    """onnxruntime's quantize_dynamic."""
    codes, scale = _int8(s.weight, axis=None)
    q = s.node("DynamicQuantizeLinear", [s.x], outputs=3)
    inputs = [q, s.const("weight_q", codes), f"{q}:2", s.const("weight_zero", np.int8(0))]
    product = s.node("Cast", [s.node("MatMulInteger", inputs)], to=1)
    return s.node("Mul", [product, s.node("Mul", [f"{q}:1", s.const("weight_scale", scale)])])


def flat_qdq(s: Scribe) -> str:
    """Q/DQ on the way to a Gemm on [rows * s, k]."""
    codes, scale = _int8(s.weight, axis=None)
    weight = [s.const("weight_q", codes), s.const("weight_scale", scale)]
    x = _qdq(s, _flat(s, s.x), "input", np.int8(0))
    return _unflat(s, s.node("Gemm", [x, s.node("DequantizeLinear", weight)]))


# ---- FP8, FP4 and vendors' operators ----------------------------------------------------------


def fp8(s: Scribe) -> str:
    """Standard operators; the weight is [n, k] as ModelOpt stores it."""
    inputs = [s.x, s.const("input_scale", np.float32(0.02))]
    quantized = s.node("QuantizeLinear", inputs, output_dtype=onnx.TensorProto.FLOAT8E4M3FN)
    x = s.node("DequantizeLinear", [quantized, inputs[1]])
    weight = s.typed("weight", onnx.TensorProto.FLOAT8E4M3FN, s.weight.T * 64)
    matrix = s.node("DequantizeLinear", [weight, s.const("weight_scale", np.float32(1 / 64))])
    return s.node("MatMul", [x, s.node("Transpose", [matrix], perm=[1, 0])])


def nvfp4(s: Scribe) -> str:
    """Two levels of scales on both sides, as TensorRT Edge-LLM writes them."""
    level = s.const("input_scale", np.float32(0.01))
    q = s.node("TRT_FP4DynamicQuantize", [s.x, level], 2, "trt", axis=-1, block_size=BLOCK)
    scales = s.node("DequantizeLinear", [f"{q}:1", level], domain="trt")
    x = s.node("DequantizeLinear", [q, scales], domain="trt", axis=-1, block_size=BLOCK)
    codes, scale = _blocks(s.weight, 6)
    packed = s.typed("weight", onnx.TensorProto.FLOAT4E2M1, codes.T)
    fine = s.typed("weight_scale", onnx.TensorProto.FLOAT8E4M3FN, scale.T * 128)
    wide = s.node("DequantizeLinear", [fine, s.const("weight_scale_2", np.float32(1 / 128))])
    matrix = s.node("DequantizeLinear", [packed, wide], axis=-1, block_size=BLOCK)
    matrix = s.node("Transpose", [s.node("Cast", [matrix], to=1)], perm=[1, 0])
    return s.node("MatMul", [x, matrix])


def mxfp8(s: Scribe) -> str:
    """Block scales that are powers of two, in vendors' operators throughout."""
    settings = {"axis": -1, "block_size": BLOCK}
    q = s.node("TRT_MXFP8DynamicQuantize", [s.x], 2, "trt", **settings)
    x = s.node("TRT_MXFP8DequantizeLinear", [q, f"{q}:1"], domain="trt", **settings)
    weight = s.typed("weight", onnx.TensorProto.FLOAT8E4M3FN, s.weight.T * 64)
    k, n = s.weight.shape
    exponents = s.const("weight_scale", np.full((n, k // BLOCK), 127 - 6, np.uint8))
    inputs = [weight, exponents]
    matrix = s.node("TRT_MXFP8DequantizeLinear", inputs, domain="trt", **settings)
    return s.node("MatMul", [x, s.node("Transpose", [matrix], perm=[1, 0])])


def int4_plugin(s: Scribe) -> str:
    """Edge-LLM's AWQ: scaled activation, weights packed as only the plugin knows."""
    scale = _channel_scale(s)
    smooth = s.node("Mul", [s.x, s.const("pre_quant_scale", scale)])
    k, n = s.weight.shape
    codes, scales = _int8(s.weight / scale[:, None], axis=0)
    inputs = [smooth, s.const("weight", codes.reshape(n, k)), s.const("weight_scale", scales)]
    sizes = {"gemm_k": k, "gemm_n": n, "group_size": k}
    return s.node("Int4GroupwiseGemmPluginV2", inputs, domain="trt_edgellm", **sizes)


def padded_plugin(s: Scribe) -> str:
    """A plugin whose width is a multiple of its tile; a Slice gives the layer's."""
    k, n = s.weight.shape
    wide = np.zeros((k, n + 24), np.float32)
    wide[:, :n] = s.weight
    codes, scales = _int8(wide + 1e-9, axis=0)
    inputs = [s.x, s.const("qweight", codes.reshape(n + 24, k)), s.const("scales", scales)]
    sizes = {"gemm_k": k, "gemm_n": n + 24, "group_size": k}
    y = s.node("Nvfp4A16GemmPlugin", inputs, domain="trt_edgellm", **sizes)
    cut = [s.const(w, np.array([v], np.int64)) for w, v in (("a", 0), ("b", n), ("c", -1))]
    return s.node("Slice", [y, *cut])


# On ONNX Runtime.
RUNNABLE: dict[str, Spelling] = {
    f.__name__: f
    for f in (
        transposed, reshaped_and_cast, gemm, int8_channels, int4_blocks, matmul_nbits, int8_qdq,
        smoothquant, awq, gptq, dynamic_int8, flat_qdq, fp8,
    )
}  # fmt: skip
# Of vendors' operators, or types that ONNX Runtime lacks: evaluated by onnx.reference.
REFERENCE_ONLY: dict[str, Spelling] = {
    f.__name__: f for f in (nvfp4, mxfp8, int4_plugin, padded_plugin)
}
