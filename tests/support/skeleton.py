"""A decoder of a few nodes, for what does not need a real one: no norms, no rotary embedding.

    model = Decoder().model()       # x [batch, sequence, 8] -> logits [batch, sequence, 5]

Nodes are named as torch's TorchScript exporter names them, weights onnx::MatMul_7.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

HIDDEN, WIDE, LAYERS = 8, 12, 2
AXES = ("batch", "sequence")
OPSETS = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
Around = Callable[["Decoder", str, str, int, int], str | None]


class Decoder:
    """A decoder's skeleton: all its projections, the rest simplified to what keeps the shapes.
    `around` may spell a projection another way: (decoder, path, x, k, n) -> y, or None."""

    def __init__(self, around: Around | None = None, axes: Sequence[str] = AXES) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.axes = axes
        self.around = around
        x = "x"
        for layer in range(LAYERS):
            x = self.layer(f"/model/layers.{layer}", x)
        self.linear("/lm_head", x, HIDDEN, 5, output="logits")

    def linear(self, path: str, x: str, k: int, n: int, output: str | None = None) -> str:
        spelled = None if self.around is None else self.around(self, path, x, k, n)
        return spelled or self.matmul(path, x, k, n, output)

    def matmul(self, path: str, x: str, k: int, n: int, output: str | None = None) -> str:
        name = f"onnx::MatMul_{len(self.weights)}"
        rng = np.random.default_rng(list(path.encode()))
        weight = rng.normal(0, 0.5 / k**0.5, (k, n)).astype(np.float32)
        self.weights.append(numpy_helper.from_array(weight, name))
        y = output or f"{path}/MatMul_output_0"
        self.nodes.append(helper.make_node("MatMul", [x, name], [y], name=f"{path}/MatMul"))
        return y

    def const(self, array: np.ndarray, name: str | None = None) -> str:
        name = name or f"const_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def op(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    @property
    def turned(self) -> list[int]:
        rank = len(self.axes) + 1
        return [*range(rank - 2), rank - 1, rank - 2]

    def layer(self, path: str, x: str) -> str:
        q, k, v = (
            self.linear(f"{path}/self_attn/{p}_proj", x, HIDDEN, HIDDEN) for p in ("q", "k", "v")
        )
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=self.turned))
        mixed = self.op("MatMul", self.op("Softmax", scores), v)
        x = self.op("Add", x, self.linear(f"{path}/self_attn/o_proj", mixed, HIDDEN, HIDDEN))
        gate, up = (self.linear(f"{path}/mlp/{p}_proj", x, HIDDEN, WIDE) for p in ("gate", "up"))
        inner = self.op("Mul", self.op("Mul", gate, self.op("Sigmoid", gate)), up)
        return self.op("Add", x, self.linear(f"{path}/mlp/down_proj", inner, WIDE, HIDDEN))

    def model(self) -> onnx.ModelProto:
        def value(name: str, width: int) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, 1, [*self.axes, width])

        graph = helper.make_graph(
            self.nodes, "g", [value("x", HIDDEN)], [value("logits", 5)], self.weights
        )
        return helper.make_model(graph, opset_imports=OPSETS, ir_version=10)


def named(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.name == name)


def answer(path: Path, feed: dict[str, np.ndarray]) -> np.ndarray:
    """logits from ONNX Runtime."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0]
