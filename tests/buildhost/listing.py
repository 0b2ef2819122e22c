"""A graph as lines to compare: inputs, initializers, nodes and outputs in file order."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

LISTINGS = Path(__file__).with_name("listings")


def listing(model: ir.Model) -> list[str]:
    graph = model.graph
    lines = [f"opset {graph.opset_imports['']} ir {model.ir_version}"]
    lines += [f"input {_typed(v)}" for v in graph.inputs]
    lines += [f"initializer {_typed(v)}" for v in graph.initializers.values()]
    lines += [_node(n) for n in graph]
    return lines + [f"output {_typed(v)}" for v in graph.outputs]


def recorded(name: str) -> list[str]:
    return (LISTINGS / f"{name}.txt").read_text().splitlines()


def _typed(value: ir.Value) -> str:
    return f"{value.name} {value.dtype} [{', '.join(str(d) for d in value.shape)}]"


def _node(node: ir.Node) -> str:
    attributes = [f"{a.name}={a.value}" for a in node.attributes.values()]
    inputs = ", ".join(v.name if v is not None else "" for v in node.inputs)
    outputs = ", ".join(v.name for v in node.outputs)
    words = " ".join([f"{node.op_type}({inputs})", *sorted(attributes)])
    return f"{node.name}: {outputs} = {words}"
