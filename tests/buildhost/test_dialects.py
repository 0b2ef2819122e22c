"""Each dialect spells the decoder's operations with the nodes recorded in listings/, and the legacy
one keeps to what TensorRT 10.3 takes.

After a deliberate change: `python -m tests.buildhost.test_dialects` records them again; read the
difference before committing it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_build.graph.decoder import build_graph
from remora_build.graph.layout import lay_out
from remora_build.graph.lint import check_graph
from remora_contract.bundle import GraphSpec, QuantSpec, load_bundle
from remora_contract.decoder import DecoderSpec, RopeSpec
from remora_contract.errors import InternalFault, Unsupported
from tests.buildhost.listing import LISTINGS, listing, recorded
from tests.support.checkpoints import make_checkpoint

SPEC = DecoderSpec(
    family="qwen3",
    layers=1,
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    intermediate=96,
    vocab=320,
    norm_eps=1e-5,
    rope=RopeSpec(1e4),
    qkv_bias=True,
    qk_norm="head",
)
INT4 = QuantSpec("int4", 32)
GRAPHS = {
    "native": GraphSpec("native", "float16", 128, 8, 24, INT4),
    "legacy": GraphSpec("legacy", "float16", 128, 8, 21, INT4),
}
PLAIN_LEGACY = GraphSpec("legacy", "float16", 128, 8, 20)


def model_of(graph: GraphSpec, spec: DecoderSpec = SPEC) -> ir.Model:
    return build_graph(spec, graph, lay_out(spec, graph))


@pytest.mark.parametrize("name", GRAPHS)
def test_the_graph_of_a_plain_decoder_is_the_recorded_one(name):
    assert listing(model_of(GRAPHS[name])) == recorded(name)


def test_the_dialects_have_the_same_inputs_outputs_and_weights():
    native, legacy = (listing(model_of(graph)) for graph in GRAPHS.values())
    shared = ("input ", "output ", "initializer ")

    def of(lines: list[str]) -> set[str]:
        return {n for n in lines if n.startswith(shared) and "const." not in n}

    assert of(native) == of(legacy)
    slots = [lay_out(SPEC, graph) for graph in GRAPHS.values()]
    assert slots[0] == slots[1]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("quant", [QuantSpec(), INT4], ids=["plain", "int4"])
def test_the_legacy_graph_keeps_to_what_tensorrt_10_3_takes(dtype, quant):
    opset = 21 if quant.kind == "int4" else 20
    check_graph(model_of(GraphSpec("legacy", dtype, 128, 8, opset, quant)), "legacy")


def test_the_native_graph_does_not():
    with pytest.raises(InternalFault, match=r"TensorScatter is not in the table of TensorRT 10\.3"):
        check_graph(model_of(GRAPHS["native"]), "legacy")


def node_of(model: ir.Model, op: str) -> ir.Node:
    return next(n for n in model.graph if n.op_type == op)


def add_node(model: ir.Model, op: str, inputs: list[ir.Value | None], **attributes) -> None:
    """At the end, its first value a graph output: nothing but TensorRT objects to it."""
    outputs = 2 if op == "TopK" else 1
    node = ir.node(op, inputs, attributes, name="new", num_outputs=outputs)
    for i, value in enumerate(node.outputs):
        value.name = f"new.{i}"
        model.graph.outputs.append(value)
    model.graph.append(node)


def constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
    value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)
    model.graph.register_initializer(value)
    return value


def value_of(model: ir.Model, name: str) -> ir.Value:
    return next(v for n in model.graph for v in n.outputs if v.name == name)


def positions(model: ir.Model) -> ir.Value:
    return next(v for v in model.graph.inputs if v.name == "position_ids")


def newer_opset(model: ir.Model) -> None:
    model.opset_imports[""] = 21


def newer_file(model: ir.Model) -> None:
    model.ir_version = 11


def foreign_type(model: ir.Model) -> None:
    add_node(model, "CumSum", [positions(model), constant(model, "axis", np.array(1))])


def computed_axes(model: ir.Model) -> None:
    axes = ir.node("Mul", [constant(model, "axis", np.array([-1]))] * 2, name="axes")
    axes.outputs[0].name = "axes"
    model.graph.insert_before(node_of(model, "ReduceMean"), axes)
    node_of(model, "ReduceMean").replace_input_with(1, axes.outputs[0])


def reduced_scatter(model: ir.Model) -> None:
    node_of(model, "ScatterElements").attributes.add(ir.AttrString("reduction", "add"))


def unsorted_top(model: ir.Model) -> None:
    logits = value_of(model, "logits")
    add_node(model, "TopK", [logits, constant(model, "k", np.array([4]))], sorted=0)


def wide_top(model: ir.Model) -> None:
    logits = value_of(model, "logits")
    add_node(model, "TopK", [logits, constant(model, "k", np.array([3840]))])


def loop_over_data(model: ir.Model) -> None:
    """As many turns as the first row's first position, none of them with a condition."""
    number, more = ir.Value(name="number"), ir.Value(name="more")
    number.type, more.type = ir.TensorType(ir.DataType.INT64), ir.TensorType(ir.DataType.BOOL)
    same = ir.node("Identity", [more], name="same")
    turn = ir.node("Identity", [number], name="turn")
    same.outputs[0].name, turn.outputs[0].name = "same", "turn"
    outputs = [same.outputs[0], turn.outputs[0]]
    body = ir.Graph([number, more], outputs, nodes=[same, turn], name="body")
    add_node(model, "Loop", [positions(model), None], body=body)


BREAKAGES = {
    "a newer opset without int4": (newer_opset, "operator set 21"),
    "a newer file format": (newer_file, "file format 11"),
    "a type the operator lacks": (foreign_type, "input 0 of CumSum is INT64"),
    "axes that are computed": (computed_axes, "input 1 of ReduceMean is computed"),
    "a scatter that adds": (reduced_scatter, "reduction of ScatterElements is 'add'"),
    "an unsorted TopK": (unsorted_top, "sorted of TopK is 0"),
    "a wide TopK": (wide_top, "TopK of 3840"),
    "a Loop over data": (loop_over_data, "number of turns is data.*without a condition"),
}


@pytest.mark.parametrize(("breakage", "words"), BREAKAGES.values(), ids=BREAKAGES.keys())
def test_the_legacy_lint_refuses(breakage, words):
    model = model_of(PLAIN_LEGACY)
    breakage(model)
    with pytest.raises(InternalFault, match=words):
        check_graph(model, "legacy")


def test_the_legacy_lint_refuses_int4_rows_of_odd_length():
    odd = replace(SPEC, vocab=321)
    with pytest.raises(InternalFault, match="odd last dimension"):
        check_graph(model_of(GRAPHS["legacy"], odd), "legacy")


def test_int4_with_an_odd_vocabulary_is_refused_in_the_legacy_dialect_only(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "llama", vocab=321)
    options = ExportOptions(int4_block=32, golden=False)
    export_checkpoint(checkpoint, tmp_path / "native", options)
    with pytest.raises(Unsupported, match=r"head has 321 outputs.*use --quant int8, or .*native"):
        export_checkpoint(checkpoint, tmp_path / "legacy", replace(options, dialect="legacy"))
    assert not (tmp_path / "legacy").exists()


@pytest.mark.parametrize(("block", "opset"), [(None, 20), (32, 21)])
def test_the_bundle_says_its_dialect_and_opset(tmp_path, block, opset):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "qwen2")
    options = ExportOptions(dialect="legacy", dtype="float32", int4_block=block, golden=False)
    export_checkpoint(checkpoint, tmp_path / "bundle", options)
    bundle = load_bundle(tmp_path / "bundle")
    assert (bundle.graph.dialect, bundle.graph.opset) == ("legacy", opset)
    assert "engines" not in bundle.notes  # unlike native, TensorRT builds it in float32
    assert ir.load(tmp_path / "bundle" / "model.onnx").opset_imports[""] == opset


if __name__ == "__main__":
    for graph_name, chosen in GRAPHS.items():
        (LISTINGS / f"{graph_name}.txt").write_text("\n".join(listing(model_of(chosen))) + "\n")
