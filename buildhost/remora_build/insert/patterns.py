"""Which nodes are linear layers: an activation times a constant matrix, in every form that
exporters write. y = x W, x [.., k], W [k, n].

    MatMul, Gemm, FusedMatMul      W stored, or made of constants (Transpose, Cast, Reshape,
                                   DequantizeLinear per tensor, channel or block, FP8 and FP4 too)
    MatMulInteger                  x through DynamicQuantizeLinear; y after Cast and Mul
    MatMulNBits, MatMulBnb4,       W packed in the operator's own way, k and n in its attributes
    the GEMM plugins of TensorRT Edge-LLM

Pure: reads a GraphView. Knows nothing of layers, names or adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from remora_build.insert.view import GraphView, Shape, attribute

MICROSOFT = "com.microsoft"
_MAX_WIDTH = 1 << 24
_PLUGINS = (
    "Int4GroupwiseGemmPlugin",
    "Int4GroupwiseGemmPluginV2",
    "Nvfp4A16GemmPlugin",
    "Nvfp4A16BlackwellGemmPlugin",
)
# Linear layers that cannot be taken apart from what surrounds them.
_CLOSED = (
    "QLinearMatMul",
    "QGemm",
    "MatMulIntegerToFloat",
    "MatMulFpQ4",
    "FusedNvfp4GemmAllReducePlugin",
)


@dataclass(frozen=True)
class Linear:
    """`x` as the node reads it, `y` [.., n] its result before any bias. `refusal` says why there
    can be no branch; k and n are then 0."""

    node: int
    x: str
    y: str
    weight: str
    k: int
    n: int
    refusal: str | None = None


def find_linears(view: GraphView) -> tuple[Linear, ...]:
    """In the graph's order. What multiplies two activations (attention) is none."""
    return tuple(_linears(view))


def _linears(view: GraphView) -> Iterator[Linear]:
    for number, node in enumerate(view.nodes):
        if node.op_type in _CLOSED:
            yield _refused(number, node, f"{node.op_type} cannot be opened")
            continue
        read = _FORMS.get((node.domain, node.op_type))
        if read is None and node.op_type in _PLUGINS:
            read = _packed
        found = None if read is None else read(view, number, node)
        if found is not None:
            yield found


def _refused(number: int, node: Any, why: str) -> Linear:
    x, weight = (*node.input, "", "")[:2]
    return Linear(number, x, (*node.output, "")[0], weight, 0, 0, refusal=why)


def _sized(linear: Linear) -> Linear:
    if 0 < linear.k <= _MAX_WIDTH and 0 < linear.n <= _MAX_WIDTH:
        return linear
    why = f"its weight is {linear.k} x {linear.n}"
    return Linear(linear.node, linear.x, linear.y, linear.weight, 0, 0, refusal=why)


def _matmul(view: GraphView, number: int, node: Any) -> Linear | None:
    if len(node.input) < 2:
        return None
    x, weight = node.input[:2]
    if view.is_constant(x) or not view.is_constant(weight):
        return None
    return _with_matrix(view, number, node, transposed=False)


def _gemm(view: GraphView, number: int, node: Any) -> Linear | None:
    return _general(view, number, node, {"transA": 0, "alpha": 1.0})


def _fused_matmul(view: GraphView, number: int, node: Any) -> Linear | None:
    flags = {"transA": 0, "alpha": 1.0, "transBatchA": 0, "transBatchB": 0}
    return _general(view, number, node, flags)


def _general(
    view: GraphView, number: int, node: Any, plain: dict[str, int | float]
) -> Linear | None:
    """A matrix product with attributes, all of which but transB must be `plain`."""
    if len(node.input) < 2 or view.is_constant(node.input[0]):
        return None
    if not view.is_constant(node.input[1]):
        return None
    for name, value in plain.items():
        if attribute(node, name) not in (None, value):
            return _refused(number, node, f"its {name} is {attribute(node, name)}")
    return _with_matrix(view, number, node, transposed=bool(attribute(node, "transB")))


def _with_matrix(view: GraphView, number: int, node: Any, *, transposed: bool) -> Linear | None:
    shape = _matrix(view.shape(node.input[1]))
    if shape is None:
        return _refused(number, node, "its weight is no matrix of known size")
    k, n = shape[::-1] if transposed else shape
    if k == 1:  # an outer product: rotary angles
        return None
    return _sized(Linear(number, node.input[0], node.output[0], node.input[1], k, n))


def _matrix(shape: Shape | None) -> tuple[int, int] | None:
    if shape is None or len(shape) != 2:
        return None
    k, n = shape
    return (k, n) if isinstance(k, int) and isinstance(n, int) else None


def _packed(view: GraphView, number: int, node: Any) -> Linear | None:
    """An operator that keeps k and n in attributes: x, then the packed weight."""
    sizes = packed_sizes(node)
    if sizes is None or len(node.input) < 2:
        return _refused(number, node, "it lacks its sizes or its weight")
    y, n = node.output[0], sizes[1]
    if node.op_type in _PLUGINS:
        y, n = _without_padding(view, y, n)
    return _sized(Linear(number, node.input[0], y, node.input[1], sizes[0], n))


def _without_padding(view: GraphView, y: str, n: int) -> tuple[str, int]:
    """A plugin's n is a multiple of its tile; the Slice that alone reads it has the layer's."""
    reader = view.only_reader(y)
    node = None if reader is None else view.nodes[reader]
    if node is None or node.op_type != "Slice":
        return y, n
    width = (view.shape(node.output[0]) or (None,))[-1]
    return (node.output[0], width) if isinstance(width, int) and width < n else (y, n)


def packed_sizes(node: Any) -> tuple[int, int] | None:
    """k and n of a weight that is packed in the operator's own way."""
    names = ("gemm_k", "gemm_n") if node.op_type in _PLUGINS else ("K", "N")
    k, n = (attribute(node, name) for name in names)
    return (k, n) if isinstance(k, int) and isinstance(n, int) else None


def _integer(view: GraphView, number: int, node: Any) -> Linear | None:
    """MatMulInteger -> Cast -> Mul(scales): its result in floats."""
    if len(node.input) < 2 or not view.is_constant(node.input[1]):
        return None
    shape = _matrix(view.shape(node.input[1]))
    cast = view.only_reader(node.output[0])
    product = None
    if cast is not None and view.nodes[cast].op_type == "Cast":
        product = view.only_reader(view.nodes[cast].output[0])
    if product is None or view.nodes[product].op_type != "Mul" or shape is None:
        return _refused(number, node, "it is not followed by Cast and Mul alone")
    y = view.nodes[product].output[0]
    return _sized(Linear(number, node.input[0], y, node.input[1], *shape))


_Reader = Callable[[GraphView, int, Any], Linear | None]
_FORMS: dict[tuple[str, str], _Reader] = {
    ("", "MatMul"): _matmul,
    ("", "Gemm"): _gemm,
    ("", "MatMulInteger"): _integer,
    (MICROSOFT, "FusedMatMul"): _fused_matmul,
    (MICROSOFT, "DynamicQuantizeMatMul"): _matmul,
    (MICROSOFT, "MatMulNBits"): _packed,
    (MICROSOFT, "MatMulBnb4"): _packed,
}
