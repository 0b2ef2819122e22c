"""The optimised model without its adapter branch: same weights by name and place, so two sessions
map one file. For requests without an adapter this path costs exactly nothing.
"""

from __future__ import annotations

import onnx

from remora_agent.engine.ort import names
from remora_contract.bundle import DecoderSpec
from remora_contract.errors import EngineFault
from remora_contract.targets import PARTS

_BANK = ("slot_a.", "slot_b.")


def without_adapters(model: onnx.ModelProto, decoder: DecoderSpec) -> onnx.ModelProto:
    """A copy in which every adapted value is its base value. Raises EngineFault when a branch
    cannot be found or removed."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    base_of = _base_values(graph, decoder)
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = base_of.get(name, name)
    _keep_live(graph)
    for value in tuple(graph.input):
        if value.name.startswith(_BANK):
            graph.input.remove(value)
    return result


def _base_values(graph: onnx.GraphProto, decoder: DecoderSpec) -> dict[str, str]:
    """Adapted value -> the value before the adapter's part was added."""
    adders = {n.name: n for n in graph.node if n.op_type == "Add"}
    base_of = {}
    for layer in range(decoder.layers):
        for parts in (PARTS[g] for g in decoder.groups(layer)):
            found = [adders[n] for p in parts if (n := names.adapted(layer, p)) in adders]
            if len(found) not in (1, len(parts)):
                raise EngineFault(f"the adapter branch of layer {layer} {parts} was optimised away")
            base_of.update({node.output[0]: node.input[0] for node in found})
    return base_of


def _keep_live(graph: onnx.GraphProto) -> None:
    """Drops nodes and initializers no output needs. Nodes are in topological order."""
    needed = {v.name for v in graph.output}
    live = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            live.append(node)
    if any(name.startswith(_BANK) for name in needed):
        raise EngineFault("the graph without adapters still reads an adapter input")
    initializers = [t for t in graph.initializer if t.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(live))
    graph.initializer.extend(initializers)
