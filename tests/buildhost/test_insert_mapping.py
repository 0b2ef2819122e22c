"""Which node is which projection: told by names, scopes or structure; and whatever is missing,
doubled, contradictory or unknown is an error that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from remora_build.insert.inserter import analyse, insert_bank, write_plan
from remora_build.insert.naming import parse_module
from remora_contract.errors import DocumentInvalid, InvalidInput, Refused, RemoraError, Unsupported
from tests.support.respell import strip_names
from tests.support.skeleton import Decoder, named


@pytest.mark.parametrize(
    ("path", "layer", "parts"),
    [
        ("model.layers.3.self_attn.q_proj.weight", 3, "q"),
        ("/model/layers.0/attn/qkv_proj/MatMul_Q4", 0, "q k v"),
        ("/m/model/layers.11/mlp/gate_proj/MatMul", 11, "gate"),
        ("_model.model.layers.2.self_attn.qkv_proj_fused.weight", 2, "q k v"),
        ("transformer.layers.1.mlp.gate_up_proj", 1, "gate up"),
        ("layers.4.attention.wo.weight", 4, "o"),
        ("layers.4.feed_forward.w2.weight", 4, "down"),
        ("model.layers.0.mlp.experts.5.down_proj.weight", 0, ""),
        ("model.layers.0.block_sparse_moe.experts.5.w1.weight", 0, ""),
        ("model.layers.0.mlp.shared_expert.up_proj", 0, ""),
        ("model.layers.0.self_attn.q_norm", 0, ""),
        ("lm_head.weight", None, ""),
    ],
)
def test_a_module_path_tells_layer_and_projections(
    path: str, layer: int | None, parts: str
) -> None:
    module = parse_module(path)
    assert module is not None
    assert (module.layer, module.parts) == (layer, tuple(parts.split()))


@pytest.mark.parametrize("path", ["onnx::MatMul_650", "val_79", "node_linear_3", "/encoder/proj"])
def test_a_name_that_says_nothing_is_no_module(path: str) -> None:
    assert parse_module(path) is None


def plan_of(model: onnx.ModelProto, directory: Path, **options: Any):
    onnx.save(model, directory / "model.onnx")
    return analyse(directory / "model.onnx", **options)


def insert_into(model: onnx.ModelProto, directory: Path, **options: Any) -> None:
    insert_bank(plan_of(model, directory, **options), directory / "out")


def test_all_fourteen_are_found_and_the_head_is_left(tmp_path: Path) -> None:
    plan = plan_of(Decoder().model(), tmp_path).plan
    assert len(plan.points) == 14
    assert plan.not_adapted == ("/lm_head/MatMul",)
    assert plan.undecided == ()


def test_structure_tells_what_names_do_not(tmp_path: Path) -> None:
    model = Decoder().model()
    by_name = {p.node: (p.layer, p.slot) for p in plan_of(model, tmp_path).plan.points}
    order = {f"node_{i}": n.name for i, n in enumerate(model.graph.node)}
    strip_names(model)
    bare = plan_of(model, tmp_path).plan
    assert {order[p.node]: (p.layer, p.slot) for p in bare.points} == by_name
    assert [order[name] for name in bare.not_adapted] == ["/lm_head/MatMul"]


def dynamo_names(model: onnx.ModelProto, *, by: str) -> None:
    """As torch.onnx's dynamo exporter leaves them: scopes in the metadata, or weights' names."""
    weights = {t.name: t for t in model.graph.initializer}
    for i, node in enumerate(model.graph.node):
        path = node.name.rpartition("/")[0].strip("/").replace("/", ".")
        node.name = f"node_linear_{i}"
        if not path:
            continue
        if by == "scope":
            scopes = ["", "model", path, f"linear_{i}"]
            node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=str(scopes))
        else:
            weights[node.input[1]].name = node.input[1] = f"{path}.weight"


@pytest.mark.parametrize("by", ["scope", "weight"])
def test_scopes_and_weights_tell_as_well_as_paths(by: str, tmp_path: Path) -> None:
    model = Decoder().model()
    dynamo_names(model, by=by)
    plan = plan_of(model, tmp_path).plan
    assert len({(p.layer, p.slot) for p in plan.points}) == 14
    assert len(plan.not_adapted) == 1


def test_a_weight_that_two_layers_share_tells_neither(tmp_path: Path) -> None:
    """Exporters keep equal tensors once; the name would put layer 1's k into layer 0."""
    model = Decoder().model()
    names = [f"/model/layers.{layer}/self_attn/k_proj/MatMul" for layer in (0, 1)]
    first, second = (named(model, name) for name in names)
    shared = next(t for t in model.graph.initializer if t.name == first.input[1])
    shared.name = first.input[1] = second.input[1] = "model.layers.0.self_attn.k_proj.weight"
    layers = {p.node: p.layer for p in plan_of(model, tmp_path).plan.points}
    assert [layers[name] for name in names] == [0, 1]


def rename(old: str, new: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        named(model, old).name = new

    return change


def drop_metadata_and_one_name(model: onnx.ModelProto) -> None:
    named(model, "/model/layers.1/self_attn/v_proj/MatMul").name = "node_12"


def disagree(model: onnx.ModelProto) -> None:
    node = named(model, "/model/layers.1/self_attn/v_proj/MatMul")
    weight = next(t for t in model.graph.initializer if t.name == node.input[1])
    weight.name = node.input[1] = "model.layers.0.self_attn.v_proj.weight"


def last_layer_unmapped(model: onnx.ModelProto) -> None:
    """Its linear layers are there, but as activations' products: nothing to bind."""
    for i in (0, 1, 2):
        model.graph.input.append(
            helper.make_tensor_value_info(f"past_key_values.{i}.key", 1, ["b", 1, "p", 8])
        )


def two_stacks(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.name.startswith("/model/layers.1"):
            node.name = node.name.replace("/model/layers.1", "/vision_tower/encoder/layers.0")


def lora_inside(model: onnx.ModelProto) -> None:
    node = named(model, "/model/layers.0/self_attn/q_proj/MatMul")
    node.name = "/model/layers.0/self_attn/q_proj/lora_A.default/MatMul"


def experts(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.name = node.name.replace("/mlp/", "/mlp/experts.0/")


def scaled_gemm(model: onnx.ModelProto) -> None:
    node = named(model, "/model/layers.0/mlp/up_proj/MatMul")
    node.op_type = "Gemm"
    node.attribute.append(helper.make_attribute("alpha", 0.5))


def closed_operator(model: onnx.ModelProto) -> None:
    named(model, "/model/layers.0/mlp/up_proj/MatMul").op_type = "MatMulFpQ4"
    named(model, "/model/layers.0/mlp/up_proj/MatMul").domain = "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


UP = "/model/layers.0/mlp/up_proj/MatMul"
BROKEN: dict[str, tuple[Callable[[onnx.ModelProto], None], type[RemoraError], str]] = {
    "a projection under another name": (
        rename(UP, "/model/layers.0/mlp/w_up/MatMul"),
        InvalidInput,
        r"no node was found for 'layers\.0\.up'.*--attach.*--targets",
    ),
    "a linear layer without a name": (
        drop_metadata_and_one_name,
        InvalidInput,
        "nothing tells which modules these nodes are: 'node_12'.*--write-attach",
    ),
    "two nodes of one module": (
        rename(UP, "/model/layers.0/mlp/gate_proj/MatMul_1"),
        InvalidInput,
        r"layers\.0\.gate is two nodes, .*gate_proj/MatMul' and .*MatMul_1'",
    ),
    "names that contradict": (
        disagree,
        InvalidInput,
        r"is 'model\.layers\.0.*' and 'model\.layers\.1",
    ),
    "a layer of the cache without projections": (
        last_layer_unmapped,
        InvalidInput,
        r"'layers\.2\.q', .* and 3 more",
    ),
    "an encoder beside the decoder": (two_stacks, InvalidInput, "more than one stack"),
    "an adapter in the graph": (lora_inside, Refused, "carries one already"),
    "experts instead of an MLP": (experts, InvalidInput, r"'layers\.0\.gate'"),
    "a Gemm that scales": (
        scaled_gemm,
        Unsupported,
        r"layers\.0\.mlp\.up_proj \(node .*alpha is 0\.5",
    ),
    "an operator that cannot be opened": (closed_operator, Unsupported, "MatMulFpQ4"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_mapped_is_named(case: str, tmp_path: Path) -> None:
    change, error, message = BROKEN[case]
    model = Decoder().model()
    change(model)
    with pytest.raises(error, match=message):
        insert_into(model, tmp_path)
    assert not (tmp_path / "out").exists()


def test_what_is_missing_may_be_left_out_on_purpose(tmp_path: Path) -> None:
    model = Decoder().model()
    experts(model)
    insert_into(model, tmp_path, wanted=("q", "k", "v", "o"))
    assert (tmp_path / "out").exists()


def test_a_merged_decoder_is_told_from_one_without_projections(tmp_path: Path) -> None:
    model = Decoder().model()
    body = helper.make_graph(
        list(model.graph.node), "then", [], [helper.make_tensor_value_info("logits", 1, None)]
    )
    del model.graph.node[:]
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "cond"))
    model.graph.node.append(
        helper.make_node("If", ["cond"], ["logits"], then_branch=body, else_branch=body)
    )
    with pytest.raises(InvalidInput, match="inside If"):
        insert_into(model, tmp_path)


# ---- attach points that are given ---------------------------------------------------------------


@pytest.mark.parametrize("case", ["names that contradict", "an encoder beside the decoder"])
def test_what_stands_in_the_way_can_be_corrected_by_hand(case: str, tmp_path: Path) -> None:
    """The derived points are written down whatever is wrong with them."""
    model = Decoder().model()
    right = plan_of(model, tmp_path).plan
    BROKEN[case][0](model)
    wrong = plan_of(model, tmp_path)
    assert wrong.plan.document() != right.document()

    document = json.loads(right.document())
    for point in document["points"]:
        point["node"] = moved(point["node"], case)
    (tmp_path / "points.json").write_text(json.dumps(document))
    insert_into(model, tmp_path, attach=tmp_path / "points.json")
    assert (tmp_path / "out" / "lora.json").exists()


def moved(name: str, case: str) -> str:
    if "encoder" in case:
        return name.replace("/model/layers.1", "/vision_tower/encoder/layers.0")
    return name


def test_incomplete_points_are_written_before_the_command_fails(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from remora_build.cli import build_app

    model = Decoder().model()
    drop_metadata_and_one_name(model)
    onnx.save(model, tmp_path / "model.onnx")
    arguments = [str(tmp_path / "model.onnx"), "--write-attach", str(tmp_path / "points.json")]
    result = CliRunner().invoke(build_app(), ["insert-lora", *arguments])
    assert isinstance(result.exception, InvalidInput)
    assert "13 points, 1 not adapted, 1 undecided" in result.stdout
    assert json.loads((tmp_path / "points.json").read_text())["undecided"] == ["node_12"]


@pytest.fixture
def document(tmp_path: Path) -> dict[str, Any]:
    analysis = plan_of(Decoder().model(), tmp_path)
    write_plan(analysis.plan, tmp_path / "points.json")
    return json.loads((tmp_path / "points.json").read_text())


def use(document: dict[str, Any], directory: Path, **options: Any) -> None:
    (directory / "points.json").write_text(json.dumps(document))
    insert_into(Decoder().model(), directory, attach=directory / "points.json", **options)


def test_points_name_nodes_that_exist(document: dict[str, Any], tmp_path: Path) -> None:
    document["points"][3]["node"] = "/no/such/node"
    document["not_adapted"].append("/model/layers.0/self_attn/o_proj/MatMul")
    with pytest.raises(InvalidInput, match=r"layers\.0\.o: the model has no node '/no/such/node'"):
        use(document, tmp_path)


def test_points_name_linear_layers(document: dict[str, Any], tmp_path: Path) -> None:
    document["points"][3]["node"] = "Softmax_5"
    document["not_adapted"].append("/model/layers.0/self_attn/o_proj/MatMul")
    with pytest.raises(InvalidInput, match=r"Softmax_5' \(Softmax\) is no linear layer"):
        use(document, tmp_path)


def test_points_forget_no_linear_layer(document: dict[str, Any], tmp_path: Path) -> None:
    del document["points"][3]
    with pytest.raises(InvalidInput, match=r"say nothing of '/model/layers\.0/self_attn/o_proj"):
        use(document, tmp_path)


def test_what_is_not_adapted_exists(document: dict[str, Any], tmp_path: Path) -> None:
    document["not_adapted"].append("/gone")
    with pytest.raises(InvalidInput, match="not_adapted names '/gone', which"):
        use(document, tmp_path)


def test_undecided_nodes_must_be_decided(document: dict[str, Any], tmp_path: Path) -> None:
    document["undecided"].append("node_7")
    with pytest.raises(DocumentInvalid, match="undecided still lists 'node_7'"):
        use(document, tmp_path)


def test_one_module_has_one_point(document: dict[str, Any], tmp_path: Path) -> None:
    document["points"][1]["parts"][0]["projection"] = "q"
    with pytest.raises(InvalidInput, match=r"layers\.0\.q is two nodes"):
        use(document, tmp_path)


def test_parts_are_as_wide_as_the_node(document: dict[str, Any], tmp_path: Path) -> None:
    document["points"][0]["parts"][0]["n"] = 7
    with pytest.raises(InvalidInput, match="has 8 columns, its parts have 7"):
        use(document, tmp_path)


def test_unknown_keys_are_refused(document: dict[str, Any], tmp_path: Path) -> None:
    document["points"][0]["rank"] = 4
    with pytest.raises(DocumentInvalid, match=r"points\[0\]\.rank"):
        use(document, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("input", "nowhere", "the model has no value 'nowhere'"),
        ("input", "logits", "is not made before"),
        ("input", "/model/layers.0/self_attn/q_proj/MatMul_output_0", "is not made before"),
        ("output", "/model/layers.0/self_attn/k_proj/MatMul_output_0", "both be added"),
        ("output", "nowhere", "no node makes the output"),
        ("output", "/model/layers.0/mlp/gate_proj/MatMul_output_0", "8 columns are needed"),
    ],
)
def test_given_values_must_fit(
    key: str, value: str, message: str, document: dict[str, Any], tmp_path: Path
) -> None:
    document["points"][0][key] = value
    with pytest.raises(InvalidInput, match=message):
        use(document, tmp_path)


def test_given_values_are_used(document: dict[str, Any], tmp_path: Path) -> None:
    document["points"][6]["input"] = "/model/layers.0/mlp/gate_proj/MatMul_output_0"
    use(document, tmp_path)
    model = onnx.load(tmp_path / "out" / "model.onnx")
    assert named(model, "layers.0.lora_a.down").input[0] == document["points"][6]["input"]
