"""The optimised model without its adapter branch: same weights by name and place, so two sessions
map one file. For requests without an adapter this path costs exactly nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from remora_agent.engine.ort import names
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import EngineFault
from remora_contract.targets import EXPERT_GROUPS, MODEL_GROUPS, PARTS

_BANK = ("slot_",)
_HEAD_ROWS = ("head.rows", "head.lora_squeezed")


def without_adapters(model: onnx.ModelProto, decoder: DecoderSpec) -> onnx.ModelProto:
    """A copy in which every adapted value is its base value. Raises EngineFault when a branch
    cannot be found or removed."""
    bypassed = _factor_nodes(model.graph, decoder) | _extra_nodes(model.graph, decoder)
    return _without(model, bypassed, _BANK)


def without_extras(model: onnx.ModelProto, decoder: DecoderSpec) -> onnx.ModelProto | None:
    """A copy in which adapters have nothing but factors on the layers' projections; None where that
    is all they have."""
    extras = _extra_nodes(model.graph, decoder)
    if not extras:
        return None
    return _without(model, extras, (*_extra_inputs(), *_expert_inputs(model.graph)))


def _extra_inputs() -> tuple[str, ...]:
    head = [names.slot_a(0, "head"), names.slot_b(0, "head")]
    return ("slot_scale.", "slot_bias.", names.SLOT_EMBED, *head)


def _expert_inputs(graph: onnx.GraphProto) -> tuple[str, ...]:
    """All of the experts' branches."""
    ends = tuple(f".{group}" for group in EXPERT_GROUPS)
    return tuple(v.name for v in graph.input if v.name.startswith(_BANK) and v.name.endswith(ends))


def _without(
    model: onnx.ModelProto, bypassed: dict[str, str], inputs: tuple[str, ...]
) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    bypassed |= _head_rows(graph)
    _bypass(graph, bypassed)
    _keep_live(graph, inputs)
    for value in tuple(graph.input):
        if value.name.startswith(inputs):
            graph.input.remove(value)
    return result


def _bypass(graph: onnx.GraphProto, bypassed: dict[str, str]) -> None:
    """In the graph and in the bodies of its nodes."""
    for node in graph.node:
        for i, name in enumerate(node.input):
            while name in bypassed:
                name = bypassed[name]
            node.input[i] = name
        for body in _bodies(node):
            _bypass(body, bypassed)
            for value in body.output:  # known to the node by their order, not their names
                value.name = bypassed.get(value.name, value.name)
            _prune(body)


def _factor_nodes(graph: onnx.GraphProto, decoder: DecoderSpec) -> dict[str, str]:
    """Adapted value -> the value before the factors' part was added."""
    adders = {n.name: n for n in graph.node if n.op_type == "Add"}
    base_of = {}
    for layer in range(decoder.layers):
        for parts in (PARTS[g] for g in decoder.groups(layer) if g not in EXPERT_GROUPS):
            found = [adders[n] for p in parts if (n := names.adapted(layer, p)) in adders]
            if len(found) not in (1, len(parts)):
                raise EngineFault(f"the adapter branch of layer {layer} {parts} was optimised away")
            base_of.update({node.output[0]: node.input[0] for node in found})
    return base_of


def _extra_nodes(graph: onnx.GraphProto, decoder: DecoderSpec) -> dict[str, str]:
    """The same of what is beyond factors on projections: DoRA, biases, embedding and head. Raises
    EngineFault when an input for it has lost its node."""
    known = {names.adapted(0, group) for group in MODEL_GROUPS}
    places = [(layer, g) for layer in range(decoder.layers) for g in decoder.groups(layer)]
    for layer, group in (*places, *((0, g) for g in MODEL_GROUPS)):
        known |= {names.rescaled(layer, group), names.rebiased(layer, group)}
    found = {n.output[0]: n.input[0] for n in graph.node if n.name in known}
    given = [v.name for v in graph.input if v.name.startswith(_extra_inputs())]
    if len(given) != len(found) + (names.slot_b(0, "head") in given):
        raise EngineFault("a part of the adapter branches was optimised away")
    return found | _expert_nodes(graph, decoder)


def _expert_nodes(graph: onnx.GraphProto, decoder: DecoderSpec) -> dict[str, str]:
    """Of the branches inside the experts' loops. Raises EngineFault when one is not found."""
    inputs = {v.name for v in graph.input}
    wanted = {
        names.expert_adapted(layer, group)
        for layer in range(decoder.layers)
        for group in EXPERT_GROUPS
        if names.expert_a(layer, group) in inputs
    }
    bodies = [body for node in graph.node for body in _bodies(node)]
    nodes = [n for body in bodies for n in body.node if n.name in wanted]
    if len(nodes) != len(wanted):
        raise EngineFault("a part of the adapter branches of experts was optimised away")
    return {n.output[0]: n.input[0] for n in nodes}


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _head_rows(graph: onnx.GraphProto) -> dict[str, str]:
    """The head's products go straight on where nothing stands between turning them into rows and
    back."""
    nodes = {n.name: n for n in graph.node if n.name in _HEAD_ROWS}
    if len(nodes) != len(_HEAD_ROWS):
        return {}
    first, last = (nodes[name] for name in _HEAD_ROWS)
    return {last.output[0]: first.input[0]}


def _keep_live(graph: onnx.GraphProto, gone: tuple[str, ...]) -> None:
    """Drops nodes and initializers no output needs. Nodes are in topological order."""
    live = _live(graph)
    needed = {v.name for v in graph.output}.union(*(_reads(node) for node in live))
    if any(name.startswith(gone) for name in needed):
        raise EngineFault("the graph without adapters still reads an adapter input")
    initializers = [t for t in graph.initializer if t.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(live)
    graph.initializer.extend(initializers)


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, its bodies included: those see the values of the graph around them."""
    yield from node.input
    for body in _bodies(node):
        for inner in body.node:
            yield from _reads(inner)
        yield from (v.name for v in body.output)


def _prune(body: onnx.GraphProto) -> None:
    """Drops what none of the body's outputs needs."""
    live = _live(body)
    del body.node[:]
    body.node.extend(live)


def _live(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes that outputs need, in their order, which is topological."""
    needed = {v.name for v in graph.output}
    live = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed.update(_reads(node))
            live.append(node)
    return live[::-1]
