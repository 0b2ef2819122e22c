"""Quantization that Remora does itself: codes as the formats define them, and graphs that answer as
torch does with the weights those codes stand for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from remora_build import quantize_formats
from remora_build.cli import build_app
from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_build.quantized.matrix import E2M1_VALUES, E4M3, Quantized, dequantize
from remora_contract.bundle import load_bundle
from remora_contract.errors import RequestInvalid, Unsupported
from tests.buildhost.reference import load_reference, reference_logits
from tests.support import quantized as peers
from tests.support.checkpoints import make_checkpoint
from tests.support.dense import dense_copy
from tests.support.portable import PortableModel

KINDS = ("int4", "int8", "mxfp8", "nvfp4")
TOKENS = np.random.default_rng(3).integers(0, 320, (2, 20))


def weights(n: int = 48, k: int = 128) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(1)) * 0.05


def test_nvfp4_is_what_the_format_says_bit_for_bit() -> None:
    w = weights()
    codes, scale, whole, _ = peers._nvfp4(w)
    made = quantize_formats.nvfp4(w.numpy().T, quantize_formats.nvfp4_global(w.abs().max().item()))
    assert (codes.numpy() == made.codes.T).all()
    assert (scale.view(torch.uint8).numpy() == made.scales.T).all()
    assert np.float32(made.global_scale) == whole.numpy()


def test_mxfp8_is_what_the_format_says_bit_for_bit() -> None:
    w = weights()
    parts, _ = peers._mxfp8(w)
    made = quantize_formats.mxfp8(w.numpy().T)
    assert (parts["weight"].view(torch.uint8).numpy() == made.codes.T).all()
    exponents = np.log2(made.scales).T + 127
    assert (exponents == parts["weight_scale"].numpy()).all()


def test_int8_is_what_the_format_says_bit_for_bit() -> None:
    codes, scale = peers._int8(weights())
    made = quantize_formats.int8(weights().numpy().T)
    assert (codes.numpy() == made.codes.T).all()
    assert (scale.numpy() == made.scales.T).all()


@given(st.floats(-8, 8, width=32))
def test_an_e2m1_code_is_the_nearest_with_ties_to_the_even_one(x: float) -> None:
    code = int(quantize_formats.e2m1_codes(np.array([x], np.float32))[0])
    distance = np.abs(E2M1_VALUES[:8] - min(abs(x), 6.0))
    nearest = np.flatnonzero(distance == distance.min())
    assert code & 7 in nearest
    assert len(nearest) == 1 or (code & 7) % 2 == 0
    assert (code >> 3) == (x < 0)


@pytest.mark.parametrize("kind", ["int8", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4])
def test_zeros_and_extremes_give_finite_codes_and_positive_scales(kind: str, scale: float) -> None:
    w = weights().numpy().T * np.float32(scale)
    w[:32, :4] = 0
    if kind == "nvfp4":
        made = quantize_formats.nvfp4(w, quantize_formats.nvfp4_global(float(np.abs(w).max())))
    else:
        made = getattr(quantize_formats, kind)(w)
    value = dequantize(made)
    assert np.isfinite(value).all() and (value[:32, :4] == 0).all()
    scales = made.scales.view(E4M3).astype(np.float32) if kind == "nvfp4" else made.scales
    assert (scales > 0).all()
    assert np.abs(value - w).max() <= 0.13 * np.abs(w).max() + 1e-30


@pytest.fixture(scope="module", params=[False, True], ids=["own-head", "tied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "checkpoint"
    return make_checkpoint(directory, "qwen3", head_dim=32, tied=request.param, dtype="bfloat16")


def made_weights(model: torch.nn.Module, kind: str) -> None:
    """Puts into a reference what the kind makes of its weights; int4 is tested elsewhere."""
    groups = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gu", "up_proj": "gu"}
    largest: dict[str, float] = {}
    modules = {n: m for n, m in model.named_modules() if n.endswith("_proj") or n == "lm_head"}
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        key = parent + groups.get(own, own)
        largest[key] = max(largest.get(key, 0.0), module.weight.abs().max().item())
    for name, module in modules.items():
        if name == "lm_head" and kind != "int8":
            continue
        parent, _, own = name.rpartition(".")
        w = module.weight.detach().numpy().T
        made: Quantized
        if kind == "nvfp4":
            whole = quantize_formats.nvfp4_global(largest[parent + groups.get(own, own)])
            made = quantize_formats.nvfp4(w, whole)
        else:
            made = getattr(quantize_formats, kind)(w)
        weight = torch.from_numpy(dequantize(made).T.copy())
        module.weight = torch.nn.Parameter(weight, requires_grad=False)


@pytest.mark.parametrize("kind", ["int8", "mxfp8", "nvfp4"])
def test_the_exported_graph_answers_as_torch_with_the_codes_weights(
    tmp_path: Path, source: Path, kind: str
) -> None:
    options = ExportOptions("float32", quant=kind, max_context=64, max_bank_rank=4)
    bundle = export_checkpoint(source, tmp_path / "bundle", options)
    assert bundle.graph.quant.plain == (() if kind == "int8" else ("head",))
    runnable = tmp_path / "bundle"
    if kind == "nvfp4":
        runnable = dense_copy(runnable, tmp_path / "dense")
        initializers = (tmp_path / "bundle" / "model.onnx").read_bytes()
        assert b"layers.0.qkv.weight.global" in initializers
    model = load_reference(source)
    made_weights(model, kind)
    have = PortableModel(runnable, rows=2).forced(TOKENS, 12)
    want = reference_logits(model, TOKENS)[:, 11:]
    assert np.abs(have - want).max() <= 1e-4
    # Golden prompts are the very graph's answers, whoever can run it.
    golden = json.loads((tmp_path / "bundle" / "golden.json").read_text())["prompts"][0]
    answers = reference_logits(model, np.array([golden["tokens"]]))[0]
    checked = answers[-len(golden["expected"]) :]
    assert np.abs(checked.max(-1) - golden["logit"]).max() <= 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_quantizes_and_says_so(tmp_path: Path, kind: str) -> None:
    source = make_checkpoint(tmp_path / "source", "llama")
    arguments = ["export", source, tmp_path / "out", "--quant", kind, "--no-golden"]
    result = CliRunner().invoke(build_app(), [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    assert kind in result.output
    quant = load_bundle(tmp_path / "out").graph.quant
    assert (quant.kind, quant.block) == (kind, {"int4": 32, "mxfp8": 32, "nvfp4": 16}.get(kind))


def test_wrong_usage_ends_with_status_2(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "llama")
    for wrong in (
        ["--quant", "int8", "--int4-block", "32"],
        ["--quant", "int3"],
        ["--original", str(source), "--own-adapters"],
    ):
        arguments = ["export", str(source), str(tmp_path / "out"), *wrong]
        assert CliRunner().invoke(build_app(), arguments).exit_code == 2
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_quantized_is_refused_with_the_next_step(tmp_path: Path) -> None:
    odd = make_checkpoint(tmp_path / "odd", "llama", intermediate=72)
    for kind, block in (("nvfp4", 16), ("mxfp8", 32)):
        with pytest.raises(Unsupported, match=rf"blocks of {block}.*72 inputs of the down.*int8"):
            export_checkpoint(odd, tmp_path / "out", ExportOptions(quant=kind))
        legacy = ExportOptions(quant=kind, dialect="legacy")
        even = make_checkpoint(tmp_path / f"even-{kind}", "llama")
        with pytest.raises(Unsupported, match="native"):
            export_checkpoint(even, tmp_path / "out", legacy)
    made = peers.quantize_checkpoint(
        make_checkpoint(tmp_path / "s", "llama"), tmp_path / "q", "modelopt-int8"
    )
    with pytest.raises(RequestInvalid, match="quantized already"):
        export_checkpoint(made.directory, tmp_path / "out", ExportOptions(quant="int8"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_input_gives_the_same_bytes(tmp_path: Path, kind: str) -> None:
    source = make_checkpoint(tmp_path / "source", "llama")
    options = ExportOptions(quant=kind, golden=False)
    bundles = [
        export_checkpoint(source, tmp_path / name, options, name="same") for name in ("a", "b")
    ]
    assert bundles[0] == bundles[1]
    plain = export_checkpoint(source, tmp_path / "plain", ExportOptions(golden=False))
    assert plain.base_digest == bundles[0].base_digest
