"""Exports of the exporters themselves. Each is skipped, saying so, where its package is missing:

onnxscript             torch.onnx's exporter of today (dynamo)
onnxruntime-genai      model builder, fp32 and int4
tensorrt-edgellm       export on a CPU; its graphs hold plugins, so what is bound is checked
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from remora_build.insert.description import InsertedBank, load_bank
from remora_build.insert.feed import bank_inputs
from remora_build.insert.inserter import analyse, insert_bank
from tests.support.adapters import make_peft_adapter
from tests.support.checkpoints import make_checkpoint
from tests.support.foreign import answers, dynamo_export, peft_tensors, reference_logits

pytestmark = pytest.mark.slow
TOKENS = np.random.default_rng(3).integers(0, 320, (2, 9))


def needs(package: str) -> Any:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


def run_module(module: str, *arguments: object) -> None:
    """`python -m module` offline; its output is shown when it fails."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def inserted(model: Path, out: Path) -> InsertedBank:
    insert_bank(analyse(model), out)
    return load_bank(out)


def check_against_peft(checkpoint: Path, model: Path, directory: Path, branches: int) -> None:
    modules = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    fused = "phi3" in (checkpoint / "config.json").read_text()
    peft_dir = make_peft_adapter(
        checkpoint, directory / "peft", seed=1, r=4, target_modules=modules if fused else None
    )
    bank = inserted(model, directory / "out")
    assert len(bank.branches) == branches
    feed = bank_inputs(bank, [peft_tensors(peft_dir)], [[0], [1]])
    have = answers(directory / "out" / "model.onnx", TOKENS, feed)
    for row, adapter in enumerate([None, peft_dir]):
        want = reference_logits(checkpoint, TOKENS[row : row + 1], adapter)
        np.testing.assert_allclose(have[row : row + 1], want, atol=1e-4)


# ---- torch.onnx, dynamo -------------------------------------------------------------------------


@needs("onnxscript")
@pytest.mark.parametrize(("family", "branches"), [("llama", 14), ("qwen2", 14), ("phi3", 8)])
def test_dynamo_exports_answer_as_transformers_with_peft(
    family: str, branches: int, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family)
    model = dynamo_export(checkpoint, tmp_path / "model.onnx")
    check_against_peft(checkpoint, model, tmp_path, branches)


# ---- onnxruntime-genai --------------------------------------------------------------------------


def genai_build(checkpoint: Path, out: Path, precision: str) -> Path:
    run_module(
        "onnxruntime_genai.models.builder",
        *("-m", "none", "-i", checkpoint, "-o", out),
        *("-p", precision, "-e", "cpu", "-c", out.with_name("cache")),
    )
    return out / "model.onnx"


@needs("onnxruntime_genai")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_genai_models_answer_as_transformers_with_peft(family: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family)
    model = genai_build(checkpoint, tmp_path / "genai", "fp32")
    check_against_peft(checkpoint, model, tmp_path, 10)


@needs("onnxruntime_genai")
def test_genai_int4_models_answer_as_their_weights_with_peft(tmp_path: Path) -> None:
    """The reference is the checkpoint with the very weights that the model holds."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "llama")
    model = genai_build(checkpoint, tmp_path / "genai", "int4")
    proto = onnx.load(model)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1  # in float32: by default the runtime rounds activations to int8
    onnx.save(proto, tmp_path / "model.onnx")
    store_dequantized(checkpoint, proto)
    check_against_peft(checkpoint, tmp_path / "model.onnx", tmp_path, 10)


def store_dequantized(checkpoint: Path, model: onnx.ModelProto) -> None:
    """Rewrites the checkpoint's projections and head to what the model's int4 stand for."""
    from safetensors.numpy import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    stored = {t.name: t for t in model.graph.initializer}
    for name in [n for n in stored if n.endswith(".MatMul.weight_Q4")]:
        packed = numpy_helper.to_array(stored[name])  # [n, blocks, bytes]
        scales = numpy_helper.to_array(stored[name.replace("_Q4", "_scales")])
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:2], -1)
        matrix = (codes.astype(np.float32) - 8) * scales.reshape(*packed.shape[:2], 1)
        matrix = matrix.reshape(len(packed), -1)
        module = name.removesuffix(".MatMul.weight_Q4").replace(".attn.", ".self_attn.")
        if module.endswith("qkv_proj"):
            q, kv = len(matrix) // 2, len(matrix) // 4
            parts = np.split(matrix, [q, q + kv])
            for part, rows in zip("qkv", parts, strict=True):
                weights[f"{module.replace('qkv_proj', part + '_proj')}.weight"] = rows.copy()
        else:
            weights[f"{module}.weight"] = matrix
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


# ---- TensorRT Edge-LLM --------------------------------------------------------------------------

Quantize = Callable[[Any], dict[str, Any]]  # weight [n, k] -> what a checkpoint stores of it


def quantizers() -> dict[str, tuple[str, Quantize]]:
    """How ModelOpt stores a projection: (algorithm, tensors). Values hardly matter here."""
    import torch

    def fp8(w: Any) -> dict[str, Any]:
        scale = {"weight_scale": torch.tensor(0.01), "input_scale": torch.tensor(0.02)}
        return {"weight": (w.float() * 100).to(torch.float8_e4m3fn), **scale}

    def mxfp8(w: Any) -> dict[str, Any]:
        scales = torch.full((w.shape[0], w.shape[1] // 32), 127, dtype=torch.uint8)
        return {"weight": w.float().to(torch.float8_e4m3fn), "weight_scale": scales}

    def nvfp4(w: Any) -> dict[str, Any]:
        n, k = w.shape
        codes = torch.randint(0, 255, (n, k // 2), dtype=torch.uint8)
        return {
            "weight": codes,
            "weight_scale": torch.ones(n, k // 16).to(torch.float8_e4m3fn),
            "weight_scale_2": torch.tensor(0.01),
            "input_scale": torch.tensor(0.01),
        }

    def awq(w: Any) -> dict[str, Any]:
        n, k = w.shape
        codes = torch.randint(0, 255, (n // 2, k), dtype=torch.uint8)
        scales = torch.full((n, k // 128), 0.01).half()
        return {"weight": codes, "weight_scale": scales, "pre_quant_scale": scale_of(w)}

    def smooth(w: Any) -> dict[str, Any]:
        n, k = w.shape
        codes = torch.randint(-127, 127, (n, k), dtype=torch.int8)
        scales = {"weight_scale": torch.full((n,), 0.01), "input_scale": torch.tensor(0.02)}
        return {"weight": codes, "pre_quant_scale": scale_of(w), **scales}

    def scale_of(w: Any) -> Any:
        return (torch.rand(w.shape[1]) + 0.5).half()

    return {
        "fp8": ("FP8", fp8),
        "mxfp8": ("MXFP8", mxfp8),
        "nvfp4": ("NVFP4", nvfp4),
        "awq": ("W4A16_AWQ", awq),
        "smoothquant": ("W8A8_SQ_PER_CHANNEL", smooth),
    }


def quantize_checkpoint(source: Path, out: Path, kind: str) -> Path:
    from safetensors.torch import load_file, save_file

    algorithm, quantize = quantizers()[kind]
    shutil.copytree(source, out)
    tensors: dict[str, Any] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{word}": t for word, t in quantize(weight).items()}
        else:
            tensors[name] = weight
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    sizes = {"mxfp8": 32, "nvfp4": 16, "awq": 128}
    settings = {"quant_algo": algorithm, "exclude_modules": ["lm_head"]}
    if kind in sizes:
        settings["group_size"] = sizes[kind]
    (out / "hf_quant_config.json").write_text(json.dumps({"quantization": settings}))
    return out


@needs("tensorrt_edgellm")
@pytest.mark.parametrize("kind", ["fp16", "fp8", "mxfp8", "nvfp4", "awq", "smoothquant"])
def test_edge_llm_exports_bind_every_projection_before_its_quantizer(
    kind: str, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(
        tmp_path / "checkpoint",
        "qwen3",
        dtype="float16",
        layers=4,
        hidden=256,
        head_dim=64,
        intermediate=512,
    )
    if kind != "fp16":
        checkpoint = quantize_checkpoint(checkpoint, tmp_path / kind, kind)
    run_module("tensorrt_edgellm.scripts.export", checkpoint, tmp_path / "edge")
    bank = inserted(tmp_path / "edge" / "llm" / "model.onnx", tmp_path / "out")

    bound = {(b.layer, p.projection) for b in bank.branches for p in b.parts}
    assert len(bound) == 28
    assert {(g.dtype, g.rows) for g in bank.gates} == {("float16", "tokens")}
    model = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    makers = {v: n for n in model.graph.node for v in n.output}
    points = json.loads((tmp_path / "out" / "attach.json").read_text())["points"]
    for point in points:
        maker = makers[point["input"]]
        assert maker.op_type in ("Mul", "Reshape")  # norm, gated activation, attention's heads
        assert not any("pre_quant_scale" in name for name in maker.input)
