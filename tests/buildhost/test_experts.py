"""Mixtures of experts: whatever the router chooses, each token meets its experts and no others are
read; adapters of experts; the two ways in which checkpoints keep them.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_ir.traversal import RecursiveGraphIterator
from transformers import AutoModelForCausalLM

from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_build.graph.decoder import build_graph
from remora_build.graph.layout import lay_out
from remora_build.graph.nodes import Nodes
from remora_build.graph.stacks import pack_words
from remora_build.graph.tiles import Tiling
from remora_contract import targets
from remora_contract.bundle import GraphSpec, QuantSpec
from remora_contract.decoder import DecoderSpec, ExpertsSpec, LayerKind, RopeSpec
from tests.buildhost.reference import load_reference, reference_logits
from tests.support.checkpoints import make_checkpoint
from tests.support.portable import PortableModel

SPEC = DecoderSpec(
    family="qwen3_moe",
    layers=2,
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    intermediate=96,
    vocab=320,
    norm_eps=1e-5,
    rope=RopeSpec(1e4),
    kinds=(LayerKind(experts=True),) * 2,
    experts=ExpertsSpec(6, 2, 32, True),
)


def tiling_session(count: int, active: int) -> onnxruntime.InferenceSession:
    nodes = Nodes({}, "none", 24)
    positions = nodes.input("positions", "int64", ["b", "s"])
    chosen = nodes.input("chosen", "int64", ["n", active])
    tiles = Tiling(nodes, ExpertsSpec(count, active, 8, True), positions)(0, chosen)
    for value, shape in ((tiles.tokens, ["t", "m"]), (tiles.expert, ["t"]), (tiles.slot, ["a"])):
        nodes.output(value, "int64", shape)
    model = ir.to_proto(nodes.model("tiling"))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def choices(rng: np.random.Generator, tokens: int, count: int, active: int, skew: float):
    """[tokens, active] different experts a token; the larger `skew`, the more they crowd."""
    scores = rng.random((tokens, count)) - skew * np.arange(count)
    return np.argsort(-scores, axis=1)[:, :active].astype(np.int64)


@pytest.mark.parametrize(("count", "active"), [(8, 2), (5, 1), (4, 4), (60, 4)])
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (3, 1), (1, 7), (2, 40)])
def test_each_token_meets_its_experts_in_tiles_that_are_few(count, active, rows, length):
    session, rng = tiling_session(count, active), np.random.default_rng(count + rows + length)
    pairs = rows * length * active
    size = -(-pairs // count)
    for skew in (0.0, 0.1, 1.0):  # even; crowded; all tokens choose the same
        chosen = choices(rng, rows * length, count, active, skew)
        positions = np.zeros((rows, length), np.int64)
        tokens, expert, slot = session.run(None, {"positions": positions, "chosen": chosen})
        assert tokens.shape == (min(pairs, count + pairs // size), size)
        assert len(set(slot.tolist())) == pairs
        assert (tokens.reshape(-1)[slot] == np.arange(pairs) // active).all()
        assert (expert[slot // size] == chosen.reshape(-1)).all()
        assert ((expert >= 0) & (expert < count)).all()


def test_one_token_runs_through_as_many_tiles_as_it_has_experts():
    tokens, expert, _ = tiling_session(60, 4).run(
        None, {"positions": np.zeros((1, 1), np.int64), "chosen": np.array([[7, 3, 59, 0]])}
    )
    assert tokens.shape == (4, 1)
    assert sorted(expert.tolist()) == [0, 3, 7, 59]


@pytest.mark.parametrize("block", [None, 32])
def test_a_stack_is_read_by_nothing_but_the_cut_of_one_expert_inside_the_loop(block):
    quant = QuantSpec("int4", block) if block else QuantSpec()
    graph = GraphSpec("native", "float16", 64, 0, 24, quant)
    model = build_graph(SPEC, graph, lay_out(SPEC, graph))
    outside = {node.name for node in model.graph}
    stacks = [v for v in model.graph.initializers.values() if ".expert_" in v.name]
    assert len(stacks) == 2 * 2 * (2 if block else 1)
    for stack in stacks:
        (use,) = stack.uses()
        assert use.node.op_type == "Gather" and use.node.attributes["axis"].as_int() == 0
        assert use.node.name not in outside
        assert use.node.inputs[1].name == f"layers.{stack.name.split('.')[1]}.expert"
    loops = [node for node in RecursiveGraphIterator(model.graph) if node.op_type == "Loop"]
    assert len(loops) == 2


def test_words_hold_eight_codes_each_of_its_own_slice():
    codes = np.random.default_rng(0).integers(-8, 8, (32, 5)).astype(np.int8)
    words = pack_words(codes)
    assert words.shape == (4, 5) and words.dtype == np.int32
    for j in range(8):
        digits = (words.view(np.uint32) >> (4 * j)) & 15
        assert (digits.astype(int) - 8 == codes[4 * j : 4 * j + 4]).all()


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_experts_in_one_parameter_make_the_same_graph_as_experts_apart(tmp_path, family):
    apart = make_checkpoint(tmp_path / "apart", family, seed=1)
    model = AutoModelForCausalLM.from_pretrained(apart, dtype=torch.float32)
    stacked = make_checkpoint(tmp_path / "stacked", family, seed=1)
    model.save_pretrained(stacked, save_original_format=False)
    options = ExportOptions(golden=False, int4_block=32)
    for name in ("apart", "stacked"):
        export_checkpoint(tmp_path / name, tmp_path / f"{name}-bundle", options)
    data = [(tmp_path / f"{n}-bundle/model.onnx.data").read_bytes() for n in ("apart", "stacked")]
    assert data[0] == data[1]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_adapters_of_experts_change_the_rows_that_use_them(tmp_path, family):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family, seed=1)
    options = ExportOptions(
        dtype="float32", max_context=64, golden=False, max_bank_rank=8, adapt=("experts",)
    )
    export_checkpoint(checkpoint, tmp_path / "bundle", options)
    reference = load_reference(checkpoint)
    tokens = np.random.default_rng(4).integers(0, 320, (2, 24))
    plain = reference_logits(reference, tokens[:1])[:, 15:]
    model = PortableModel(tmp_path / "bundle", rows=2)
    feed = put_experts(model, reference)
    model.adapter_feed |= feed
    have = model.forced(tokens, prompt=16)
    assert np.abs(have[:1] - plain).max() <= 1e-4
    adapted = reference_logits(reference, tokens[1:])[:, 15:]
    assert np.abs(have[1:] - adapted).max() <= 1e-4
    assert np.abs(adapted - have[:1]).max() > 0.1


def put_experts(model: PortableModel, reference: torch.nn.Module) -> dict[str, np.ndarray]:
    """Random factors of rank 3 for every expert, used by the second row alone, as inputs; the same
    merged into the reference."""
    rng, spec, feed = np.random.default_rng(5), model.bundle.decoder, {}
    weights = dict(reference.named_parameters())
    stored = {"expert_gate_up": "gate_up_proj", "expert_down": "down_proj"}
    for group in targets.EXPERT_GROUPS:
        k = spec.in_features(targets.PARTS[group][0])
        n = sum(spec.out_features(p) for p in targets.PARTS[group])
        feed[targets.lora_gate(group)] = np.array([[[0.0] * 3], [[1.0] * 3]], np.float32)
        for layer in range(spec.layers):
            a = rng.standard_normal((spec.experts.count, k, 3)).astype(np.float32) / 8
            b = rng.standard_normal((spec.experts.count, 3, n)).astype(np.float32) / 2
            feed |= {targets.lora_a(layer, group): a, targets.lora_b(layer, group): b}
            weight = weights[f"model.layers.{layer}.mlp.experts.{stored[group]}"]
            with torch.no_grad():
                weight += torch.from_numpy(a @ b).transpose(1, 2)
    return feed
