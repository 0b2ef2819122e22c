"""The graph is what docs/graph.md says, and the lint refuses what it forbids."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_build.graph.decoder import DATA_FILE, build_graph
from remora_build.graph.layout import ALIGNMENT, lay_out
from remora_build.graph.lint import check_graph
from remora_contract.bundle import GRAPH_FILE, GraphSpec, QuantSpec
from remora_contract.decoder import DecoderSpec, RopeSpec
from remora_contract.errors import InternalFault
from remora_contract.graph_lint import lint
from tests.support.checkpoints import make_checkpoint

SPEC = DecoderSpec(
    family="qwen3",
    layers=2,
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


def graph_spec(block: int | None = None, rank: int = 8) -> GraphSpec:
    quant = QuantSpec("int4", block) if block else QuantSpec()
    return GraphSpec("native", "float16", 128, rank, 24, quant)


def build(spec: DecoderSpec = SPEC, graph: GraphSpec | None = None) -> ir.Model:
    chosen = graph or graph_spec()
    return build_graph(spec, chosen, lay_out(spec, chosen))


def shapes(values) -> dict[str, tuple]:
    return {
        v.name: tuple(d if isinstance(d, int) else d.value for d in v.shape.dims) for v in values
    }


def test_inputs_and_outputs_are_the_contracts():
    model = build()
    inputs, outputs = shapes(model.graph.inputs), shapes(model.graph.outputs)
    cache = ("b", 2, 128, 16)
    assert inputs["input_ids"] == inputs["position_ids"] == ("b", "s")
    assert inputs["last_index"] == ("b", 1)
    assert inputs["past_key.0"] == inputs["past_value.1"] == outputs["present_value.1"] == cache
    assert inputs["lora_a.1.qkv"] == (64, "t_qkv")
    assert inputs["lora_b.0.gate_up"] == ("t_gate_up", 192)
    assert inputs["lora_gate.down"] == ("b", 1, "t_down")
    assert outputs["logits"] == ("b", 320)
    assert len(inputs) == 3 + 2 * 2 + 2 * 8 + 4
    assert list(outputs) == [
        "logits",
        *(f"present_{part}.{layer}" for layer in range(2) for part in ("key", "value")),
    ]


def test_initializers_have_the_contracts_names_and_shapes():
    found = shapes(build().graph.initializers.values())
    assert found["embed.weight"] == (320, 64)
    assert found["layers.0.qkv.weight"] == (64, 128)
    assert found["layers.0.qkv.bias"] == (128,)
    assert found["layers.1.o.weight"] == (64, 64)
    assert found["layers.1.gate_up.weight"] == (64, 192)
    assert found["layers.1.down.weight"] == (96, 64)
    assert found["layers.1.k_norm.weight"] == (16,)
    assert found["head.weight"] == (64, 320)
    assert found["rope.cos"] == found["rope.sin"] == (128, 8)
    named = {"layers.0.norm_attention.weight", "layers.1.norm_mlp.weight", "norm.weight"}
    assert named < set(found)


def test_int4_initializers_are_codes_and_scales():
    model = build(graph=graph_spec(block=32))
    found = model.graph.initializers
    assert shapes(found.values())["layers.1.down.weight.scale"] == (3, 64)
    assert found["head.weight.q"].dtype == ir.DataType.INT4
    assert found["head.weight.scale"].dtype == found["embed.weight"].dtype == ir.DataType.FLOAT16
    assert "layers.0.qkv.weight" not in found
    node = next(n for n in model.graph if n.name == "layers.0.qkv.dequantize")
    assert (node.attributes["axis"].as_int(), node.attributes["block_size"].as_int()) == (0, 32)


def test_a_tied_head_is_the_embedding_unless_quantized():
    tied = DecoderSpec(**{**SPEC.__dict__, "tied_embeddings": True})
    assert "head.weight" not in build(tied).graph.initializers
    assert "head.weight.q" in build(tied, graph_spec(block=32)).graph.initializers


def test_nodes_are_named_after_what_they_compute():
    names = {n.name: n.op_type for n in build().graph}
    assert names["layers.1.gate_up.matmul"] == "MatMul"
    assert names["layers.0.attention"] == "Attention"
    assert names["layers.0.norm_attention"] == names["norm"] == "RMSNormalization"
    assert names["layers.1.lora_a.down"] == names["layers.1.lora_b.down"] == "MatMul"
    values = {v.name for n in build().graph for v in n.outputs}
    assert {"embed.output", "layers.0.output", "layers.1.output"} < values


def test_the_operators_are_those_the_three_runtimes_fuse():
    counts = Counter(n.op_type for n in build().graph)
    assert counts["Attention"] == 2
    assert counts["TensorScatter"] == counts["RotaryEmbedding"] == 4
    assert counts["RMSNormalization"] == 2 * 4 + 1
    assert counts["Where"] == 1  # one mask for all layers


@pytest.mark.parametrize("block", [None, 32])
def test_the_written_model_passes_the_full_checker_and_its_tensors_are_aligned(tmp_path, block):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "qwen2")
    options = ExportOptions(int4_block=block, golden=False)
    export_checkpoint(checkpoint, tmp_path / "bundle", options)
    path = tmp_path / "bundle" / GRAPH_FILE
    onnx.checker.check_model(str(path), full_check=True)
    for value in ir.load(path).graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            assert value.const_value.offset % ALIGNMENT == 0
            assert Path(value.const_value.path).name == DATA_FILE


def test_what_the_exporter_builds_passes_its_own_lint():
    assert list(lint(build())) == []


def node_of(model: ir.Model, op: str) -> ir.Node:
    return next(n for n in model.graph if n.op_type == op)


def past_key(model: ir.Model) -> ir.Value:
    return next(v for v in model.graph.inputs if v.name == "past_key.0")


def add_attribute(name: str):
    return lambda m: node_of(m, "Attention").attributes.add(ir.AttrInt64(name, 1))


def add_attention_input(model: ir.Model) -> None:
    node = node_of(model, "Attention")
    node.resize_inputs(6)
    node.replace_input_with(4, past_key(model))
    node.replace_input_with(5, past_key(model))


def drop_mask(model: ir.Model) -> None:
    node_of(model, "Attention").resize_inputs(3)


def bool_mask(model: ir.Model) -> None:
    mask = ir.Value(name="mask_in", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([1]))
    model.graph.inputs.append(mask)
    node_of(model, "Attention").replace_input_with(3, mask)


def unused_input(model: ir.Model) -> None:
    value = ir.Value(name="spare", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    model.graph.inputs.append(value)


def foreign_operator(model: ir.Model) -> None:
    node_of(model, "Sigmoid").domain = "com.microsoft"


def dead_node(model: ir.Model) -> None:
    embedding = model.graph.initializers["embed.weight"]
    model.graph.append(ir.node("Identity", [embedding], name="dead"))


def unsigned_codes(model: ir.Model) -> None:
    model.graph.initializers["embed.weight"].dtype = ir.DataType.UINT4


def same_name(model: ir.Model) -> None:
    node_of(model, "Sigmoid").name = "layers.0.attention"


BREAKAGES = {
    "is_causal": (add_attribute("is_causal"), "is_causal"),
    "softcap": (add_attribute("softcap"), "softcap"),
    "past inputs of Attention": (add_attention_input, "past_key"),
    "no mask": (drop_mask, "no mask"),
    "a bool mask as input": (bool_mask, "mask_in"),
    "an unused input": (unused_input, "spare"),
    "a foreign operator": (foreign_operator, "com.microsoft"),
    "a dead node": (dead_node, "dead"),
    "unsigned codes": (unsigned_codes, "UINT4"),
    "a name used twice": (same_name, "twice"),
}


@pytest.mark.parametrize(("breakage", "word"), BREAKAGES.values(), ids=BREAKAGES.keys())
def test_the_lint_refuses(breakage, word):
    model = build()
    breakage(model)
    with pytest.raises(InternalFault, match=word):
        check_graph(model)
