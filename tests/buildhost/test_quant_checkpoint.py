"""Quantized checkpoints are read as they are, or refused by the name of what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_build.quantized import modelopt
from remora_build.quantized.scheme import METHODS
from remora_contract.bundle import GRAPH_FILE, Bundle
from remora_contract.errors import CheckpointInvalid, RemoraError, Unsupported
from remora_contract.quant import QuantKind
from tests.support.checkpoints import make_checkpoint
from tests.support.dense import dense_copy
from tests.support.portable import PortableModel
from tests.support.quantized import LAYOUTS, Made, quantize_checkpoint
from tests.support.quantized_models import reference

OPTIONS = ExportOptions("float32", max_context=64, max_bank_rank=4, golden=False, own_adapters=True)
QUANT_KINDS = set(get_args(QuantKind)) - {"none"}
TOKENS = np.random.default_rng(3).integers(0, 320, (2, 14))
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "checkpoint"
    return make_checkpoint(directory, "llama", hidden=128, intermediate=256, seed=5)


@pytest.fixture
def make(source: Path, tmp_path: Path) -> Callable[..., Made]:
    def make(layout: str, **settings: Any) -> Made:
        return quantize_checkpoint(source, tmp_path / "quantized", layout, **settings)

    return make


def export(made: Made, **changes: Any) -> Bundle:
    options = ExportOptions(**vars(OPTIONS) | changes)
    return export_checkpoint(made.directory, made.directory.parent / "bundle", options)


def edit(made: Made, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = made.directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(made: Made, error: type[RemoraError], *words: str, **changes: Any) -> None:
    with pytest.raises(error) as caught:
        export(made, **changes)
    for word in words:
        assert word in str(caught.value)
    assert not (made.directory.parent / "bundle").exists()


def test_codes_and_scales_lie_in_the_graph_bit_for_bit(make) -> None:
    made = make("modelopt-nvfp4")
    export(made, dtype="float16")
    graph = ir.load(made.directory.parent / "bundle" / GRAPH_FILE).graph
    stored = load_file(made.directory / "model.safetensors")
    weight = graph.initializers["layers.0.qkv.weight.q"].const_value
    parts = [stored[f"model.layers.0.self_attn.{p}_proj.weight"] for p in "qkv"]
    pairs = torch.cat(parts).numpy()
    codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(len(pairs), -1)
    flat = codes.T.reshape(-1)
    assert weight.tobytes() == (flat[0::2] | (flat[1::2] << 4)).tobytes()
    scales = [stored[f"model.layers.0.self_attn.{p}_proj.weight_scale"] for p in "qkv"]
    found = graph.initializers["layers.0.qkv.weight.scale"].const_value.tobytes()
    assert found == torch.cat(scales).view(torch.uint8).numpy().T.tobytes()
    whole = graph.initializers["layers.0.qkv.weight.global"].const_value.numpy()
    assert sorted(set(whole.tolist())) == sorted(
        {stored[f"model.layers.0.self_attn.{p}_proj.weight_scale_2"].item() for p in "qkv"}
    )


@pytest.mark.parametrize("layout", ["modelopt-nvfp4", "modelopt-smoothquant", "autoawq", "ct-fp8"])
def test_a_quantized_head_is_carried_and_proven_too(make, source: Path, layout: str) -> None:
    made = make(layout, head=True)
    bundle = export(made, golden=True)
    assert bundle.graph.quant.plain == ()
    runnable = made.directory.parent / "bundle"
    if bundle.graph.quant.kind == "nvfp4":
        runnable = dense_copy(runnable, made.directory.parent / "dense")
    have = PortableModel(runnable, rows=2).step(TOKENS)
    model = reference(source, made)
    with torch.no_grad():
        want = model(torch.from_numpy(TOKENS)).logits[:, -1].numpy()
        golden = json.loads((made.directory.parent / "bundle" / "golden.json").read_text())
        prompt = golden["prompts"][0]
        answers = model(torch.tensor([prompt["tokens"]])).logits[0, -len(prompt["logit"]) :]
    tolerance = 2e-2 if bundle.graph.quant.activations != "none" else 1e-3
    assert np.abs(have - want).max() <= tolerance
    assert np.abs(answers.max(-1).values.numpy() - prompt["logit"]).max() <= tolerance


def test_modules_the_tool_left_alone_stay_in_the_graphs_dtype(make, source: Path) -> None:
    made = make("modelopt-mxfp8")
    original = load_file(source / "model.safetensors")
    down = "model.layers.1.mlp.down_proj"

    def put_back(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{down}.weight_scale"]
        tensors[f"{down}.weight"] = original[f"{down}.weight"]

    edit(made, put_back)
    assert export(made).graph.quant.plain == ("head", "layers.1.down")
    del made.modules[down]
    have = PortableModel(made.directory.parent / "bundle", rows=2).step(TOKENS)
    with torch.no_grad():
        want = reference(source, made)(torch.from_numpy(TOKENS)).logits[:, -1].numpy()
    assert np.abs(have - want).max() <= 1e-4


def test_a_quantized_cache_is_left_out_and_said_so(make) -> None:
    made = make("modelopt-fp8", kv_cache_quant_algo="FP8")
    scales = {f"{Q[:-6]}k_proj.k_scale": 0.5, f"{Q[:-6]}v_proj.v_scale": 0.25}
    edit(made, lambda t: t.update({n: torch.tensor(v) for n, v in scales.items()}))
    bundle = export(made)
    assert "FP8" in bundle.notes["quantized"]["cache"]
    edit(made, lambda t: [t.pop(n) for n in scales])
    without = export_checkpoint(made.directory, made.directory.parent / "second", OPTIONS)
    assert without.base_digest != bundle.base_digest  # every tensor counts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_missing_piece_is_named(make, layout: str) -> None:
    made = make(layout)
    optional = ("g_idx", "pre_quant_scale", "input_global_scale")
    kind = "modelopt-nvfp4"
    pieces = [n for n in load_file(made.directory / "model.safetensors") if n.startswith(f"{Q}.")]
    needed = [n for n in pieces if not n.endswith(optional)]
    if layout.startswith(kind):
        needed = [n for n in needed if not n.endswith("input_scale")]
    gone = sorted(needed)[-1]
    edit(made, lambda t: t.pop(gone))
    refused(made, CheckpointInvalid, gone)


def damage_scale(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        scale = tensors[f"{Q}.weight_scale"]
        scale.reshape(-1)[0] = value

    return change


def flip(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name] * 2

    return change


def nan_code(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.weight"].view(torch.uint8)[0, 0] = 0x7F


def recast(name: str, dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)

    return change


def cut(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:-1].contiguous()

    return change


def half_quantized(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{Q}.weight_scale"]
    tensors[f"{Q}.weight"] = torch.zeros(tensors[f"{Q}.weight"].shape)


def reordered(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.g_idx"] = tensors[f"{Q}.g_idx"].flip(0).contiguous()


def shifted_zero(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.qzeros"] += 1


DAMAGES: dict[str, tuple[str, Callable, type[RemoraError], str]] = {
    "a negative scale": ("ct-int8", damage_scale(-1.0), CheckpointInvalid, Q),
    "an infinite scale": ("ct-int8", damage_scale(float("inf")), CheckpointInvalid, Q),
    "a NaN code": ("modelopt-mxfp8", nan_code, CheckpointInvalid, "NaN codes"),
    "another dtype of codes": (
        "modelopt-int8",
        recast(f"{Q}.weight", torch.uint8),
        CheckpointInvalid,
        "U8",
    ),
    "another shape of scales": ("gptq", cut(f"{Q}.scales"), CheckpointInvalid, f"{Q}.scales"),
    "a norm of integers": (
        "ct-int8",
        recast("model.norm.weight", torch.int8),
        Unsupported,
        "model.norm.weight",
    ),
    "parts that differ in smoothing": (
        "modelopt-smoothquant",
        flip(f"{Q}.pre_quant_scale"),
        Unsupported,
        "pre_quant_scale",
    ),
    "parts that differ in rounding": (
        "modelopt-fp8",
        flip(f"{Q}.input_scale"),
        Unsupported,
        "input_scale",
    ),
    "a part left alone": ("ct-int8", half_quantized, Unsupported, "only"),
    "an activation order": ("gptq", reordered, CheckpointInvalid, "desc_act"),
    "a false symmetry": ("gptq", shifted_zero, CheckpointInvalid, "symmetric"),
    "a tensor too many": (
        "autoawq",
        lambda t: t.update({f"{Q}.strange": torch.zeros(2)}),
        CheckpointInvalid,
        "dropped silently",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_by_name(make, damage: str) -> None:
    layout, change, error, word = DAMAGES[damage]
    made = make(layout)
    edit(made, change)
    refused(made, error, word)


CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown tool": ("ct-int8", {"quant_method": "bitsandbytes"}, "bitsandbytes"),
    "unknown algorithm": ("modelopt-int8", {"quant_algo": "NVFP4_SVD"}, "NVFP4_SVD"),
    "mixed precision": ("modelopt-int8", {"quant_algo": "MIXED_PRECISION"}, "MIXED_PRECISION"),
    "unknown field": ("modelopt-int8", {"rotation": "hadamard"}, "rotation"),
    "AWQ gemv": ("autoawq", {"version": "gemv"}, "version"),
    "AWQ of a whole column": ("autoawq", {"group_size": -1}, "group_size"),
    "AWQ in 8 bits": ("autoawq", {"bits": 8}, "bits"),
    "GPTQ by activation": ("gptq", {"desc_act": True}, "desc_act"),
    "GPTQ per module": ("gptq", {"dynamic": {"+:.*": {"bits": 8}}}, "dynamic"),
    "rotations": ("ct-int8", {"transform_config": {"config_groups": {"R": {}}}}, "transform"),
    "sparsity": ("ct-int8", {"sparsity_config": {"format": "sparse"}}, "sparsity_config"),
    "another form": ("ct-int8", {"format": "marlin-24", "config_groups": "format"}, "marlin-24"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_is_not_carried_is_refused_by_its_field(make, case: str) -> None:
    layout, changes, word = CONFIGS[case]
    if changes.get("config_groups") == "format":  # the group's own word comes first
        group = json.loads(json.dumps(LAYOUTS[layout][1]["config_groups"]))
        group["group_0"]["format"] = changes["format"]
        changes = changes | {"config_groups": group}
    refused(make(layout, **changes), Unsupported, word)


def test_two_schemes_in_one_checkpoint_are_refused(make) -> None:
    groups = json.loads(json.dumps(LAYOUTS["ct-int8"][1]["config_groups"]))
    groups["group_1"] = json.loads(json.dumps(groups["group_0"]))
    groups["group_1"]["weights"]["num_bits"] = 4
    refused(make("ct-int8", config_groups=groups), Unsupported, "2 config_groups that differ")


def test_the_two_files_of_modelopt_must_agree(make) -> None:
    made = make("modelopt-int8")
    path = made.directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["quant_algo"] = "NVFP4"
    path.write_text(json.dumps(config))
    refused(made, CheckpointInvalid, "NVFP4", "W8A16")


def test_an_absurd_config_is_an_error_and_no_crash(make) -> None:
    made = make("ct-int8")
    path = made.directory / "config.json"
    config = json.loads(path.read_text())
    for wrong in (["a"], "x", {"quant_method": ["awq"]}, {"quant_method": "compressed-tensors"}):
        path.write_text(json.dumps(config | {"quantization_config": wrong}))
        with pytest.raises((CheckpointInvalid, Unsupported)):
            export(made)


@pytest.mark.parametrize("family", ["phi3", "gemma2", "olmo2"])
@pytest.mark.parametrize("layout", ["modelopt-nvfp4", "autoawq", "modelopt-smoothquant"])
def test_fused_tensors_and_other_placements_of_norms_are_read_too(
    tmp_path: Path, family: str, layout: str
) -> None:
    plain = make_checkpoint(tmp_path / "plain", family, seed=2)
    made = quantize_checkpoint(plain, tmp_path / "quantized", layout)
    bundle = export(made)
    runnable = tmp_path / "bundle"
    if bundle.graph.quant.kind == "nvfp4":
        runnable = dense_copy(runnable, tmp_path / "dense")
    have = PortableModel(runnable, rows=2).step(TOKENS)
    with torch.no_grad():
        want = reference(plain, made)(torch.from_numpy(TOKENS)).logits[:, -1].numpy()
    rounded = bundle.graph.quant.activations != "none"
    assert np.abs(have - want).max() <= (1e-1 if rounded else 1e-3)


def test_a_mixture_of_experts_is_refused_by_name(tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "plain", "qwen3_moe")
    with pytest.raises(Unsupported, match="experts"):
        export_checkpoint(plain, tmp_path / "bundle", ExportOptions(quant="int8"))
    made = quantize_checkpoint(plain, tmp_path / "quantized", "modelopt-int8")
    refused(made, Unsupported, "mixture of experts")


def test_the_page_names_every_tool_and_form() -> None:
    page = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text()
    for algorithm in modelopt.ALGORITHMS:
        assert f"`{algorithm}`" in page
    for word in ("AutoAWQ", "GPTQ", "compressed-tensors", "`fp8`", *QUANT_KINDS):
        assert word in page
    assert {"awq", "compressed-tensors", "fp8", "gptq"} == set(METHODS)


def test_a_width_that_no_block_divides_is_refused(tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "plain", "llama", intermediate=80)
    made = quantize_checkpoint(plain, tmp_path / "quantized", "modelopt-int8")
    config = {"quant_method": "awq", "bits": 4, "group_size": 32}
    path = made.directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    (made.directory / "hf_quant_config.json").unlink()
    down = "model.layers.0.mlp.down_proj"

    def as_awq(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{down}.weight"], tensors[f"{down}.weight_scale"]
        tensors[f"{down}.qweight"] = torch.zeros(80, 8, dtype=torch.int32)

    edit(made, as_awq)
    refused(made, CheckpointInvalid, down, "do not divide")


@pytest.mark.parametrize("value", [1e-9, 1e9])
def test_a_smoothing_that_float16_cannot_hold_is_refused(make, value: float) -> None:
    made = make("modelopt-smoothquant")

    def extreme(tensors: dict[str, torch.Tensor]) -> None:
        for part in "qkv":
            tensors[f"model.layers.0.self_attn.{part}_proj.pre_quant_scale"][0] = value

    edit(made, extreme)
    refused(made, CheckpointInvalid, "layers.0.qkv.weight.prescale", "float32", dtype="float16")
    export(made)
