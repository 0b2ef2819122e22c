"""A copy of a bundle whose e2m1 weights are evaluated by onnx's reference implementation, because
ONNX Runtime has no kernel for them. Uses nothing of Remora's own arithmetic.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from remora_contract.bundle import GRAPH_FILE


def dense_copy(bundle: Path, out: Path) -> Path:
    """`out`: the same bundle, DequantizeLinear of e2m1 codes (and the Cast behind) evaluated."""
    shutil.copytree(bundle, out)
    model = onnx.load(out / GRAPH_FILE)
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output}
    constants = {i.name: i for i in graph.initializer}
    fp4 = {n for n, i in constants.items() if i.data_type == TensorProto.FLOAT4E2M1}
    for node in [n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in fp4]:
        chain = [producers[node.input[1]], node]
        after = [n for n in graph.node if node.output[0] in n.input]
        if after[0].op_type == "Cast":
            chain.append(after[0])
        last = chain[-1].output[0]
        names = {i for n in chain for i in n.input if i in constants}
        part = onnx.helper.make_graph(
            chain,
            "part",
            [],
            [onnx.helper.make_empty_tensor_value_info(last)],
            [constants[i] for i in sorted(names)],
        )
        sub = onnx.helper.make_model(part, opset_imports=model.opset_import, ir_version=11)
        (value,) = ReferenceEvaluator(sub).run(None, {})
        for gone in chain:
            graph.node.remove(gone)
        for name in sorted(names):
            graph.initializer.remove(constants[name])
        graph.initializer.append(numpy_helper.from_array(value, last))
    onnx.save(model, out / GRAPH_FILE)
    return out
