"""Quantized checkpoints in the layouts of ModelOpt, AutoAWQ, GPTQ and llm-compressor, made from a
tiny float checkpoint by code of their own that follows each format's definition.

    made = quantize_checkpoint(source, tmp_path / "q", "modelopt-int4-awq", seed=1)
    model = quantized_models.reference(source, made)  # what it means, in torch

Needs torch; knows nothing of how Remora reads them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Truth:
    """What one module computes: weight [n, k] on round(x * prescale)."""

    weight: torch.Tensor
    prescale: torch.Tensor | None = None
    input_scale: float | None = None
    rounding: str = "none"


@dataclass
class Made:
    directory: Path
    modules: dict[str, Truth] = field(default_factory=dict)


Maker = Callable[[torch.Tensor, torch.Generator, str], tuple[Tensors, Truth]]


def quantize_checkpoint(
    source: Path, out: Path, layout: str, *, seed: int = 0, head: bool = False, **changes: Any
) -> Made:
    """Copies `source`, every projection (and the head) stored in `layout`. `changes` go into the
    tool's config."""
    make, config = LAYOUTS[layout]
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    made, stored = Made(out), {}
    shared: dict[str, int] = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj") and not (head and module == "lm_head"):
            stored[name] = tensor
            continue
        # Modules that read the same input share what is done to it.
        key = module.replace("k_proj", "q_proj").replace("v_proj", "q_proj")
        state = shared.setdefault(key.replace("up_proj", "gate_proj"), len(shared))
        own = torch.Generator().manual_seed(seed * 1000 + state)
        parts, truth = make(tensor.float(), own, module)
        stored |= {f"{module}.{suffix}": t.contiguous() for suffix, t in parts.items()}
        made.modules[module] = truth
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    write_config(out, json.loads(json.dumps(config)) | changes)
    return made


def write_config(out: Path, config: dict[str, Any]) -> None:
    """ModelOpt's lies beside config.json; the others' in it."""
    path = out / "config.json"
    whole = json.loads(path.read_text())
    if "quant_algo" in config:
        beside = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": config}
        (out / "hf_quant_config.json").write_text(json.dumps(beside))
        config = {"quant_method": "modelopt", "quant_algo": config["quant_algo"]}
    path.write_text(json.dumps(whole | {"quantization_config": config}))


def _prescale(k: int, generator: torch.Generator) -> torch.Tensor:
    return 0.5 + 1.5 * torch.rand(k, generator=generator)


def _grid(scaled: torch.Tensor) -> torch.Tensor:
    """Index of the nearest e2m1 number."""
    values = E2M1[:8]
    index = (scaled.abs()[..., None] - values).abs().argmin(-1)
    return (index + 8 * (scaled < 0)).to(torch.uint8)


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Pairs along the last axis into bytes, the first in the low half."""
    return (codes[..., 0::2] & 15) | ((codes[..., 1::2] & 15) << 4)


def _words(codes: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Unsigned codes along the last axis into int32 words."""
    per = 32 // bits
    groups = codes.to(torch.int64).reshape(*codes.shape[:-1], -1, per)
    words = torch.zeros(groups.shape[:-1], dtype=torch.int64)
    for i, source in enumerate(order or range(per)):
        words |= groups[..., source] << (bits * i)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _int4(w: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric codes [n, k], scales [n, k / block]."""
    blocks = w.reshape(len(w), -1, block)
    scale = blocks.abs().amax(-1) / 7
    codes = torch.clamp(torch.round(blocks / scale[..., None]), -8, 7)
    return codes.reshape(w.shape).to(torch.int8), scale


def _uint4(w: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric codes [n, k] and zero points, scales [n, k / block], float16."""
    blocks = w.reshape(len(w), -1, block)
    top, low = blocks.amax(-1), blocks.amin(-1)
    scale = ((top - low) / 15).half().float()
    zero = torch.clamp(torch.round(-low / scale), 0, 15)
    codes = torch.clamp(torch.round(blocks / scale[..., None]) + zero[..., None], 0, 15)
    return codes.reshape(w.shape), zero, scale


def _spread(scale: torch.Tensor, block: int) -> torch.Tensor:
    return scale.float().repeat_interleave(block, dim=-1)


def _nvfp4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes [n, k], e4m3 scales [n, k / 16], global scale, weight."""
    whole = w.abs().max() / (6 * 448)
    blocks = w.reshape(len(w), -1, 16)
    scale = (blocks.abs().amax(-1) / (6 * whole)).to(torch.float8_e4m3fn)
    codes = _grid(blocks / (scale.float() * whole)[..., None]).reshape(w.shape)
    return codes, scale, whole, E2M1[codes.long()] * _spread(scale, 16) * whole


def modelopt_nvfp4(w: torch.Tensor, g: torch.Generator, module: str) -> tuple[Tensors, Truth]:
    codes, scale, whole, weight = _nvfp4(w)
    parts = {
        "weight": _nibbles(codes),
        "weight_scale": scale,
        "weight_scale_2": whole,
        "input_scale": torch.tensor(0.01),
    }
    return parts, Truth(weight)


def modelopt_nvfp4_awq(w: torch.Tensor, g: torch.Generator, module: str) -> tuple[Tensors, Truth]:
    prescale = _prescale(w.shape[1], g)
    parts, truth = modelopt_nvfp4(w / prescale, g, module)
    return parts | {"pre_quant_scale": prescale}, Truth(truth.weight, prescale)


def _mxfp8(w: torch.Tensor) -> tuple[Tensors, Truth]:
    blocks = w.reshape(len(w), -1, 32)
    exponent = torch.ceil(torch.log2(blocks.abs().amax(-1) / 448))
    codes = (blocks / torch.exp2(exponent)[..., None]).to(torch.float8_e4m3fn).reshape(w.shape)
    weight = codes.float() * _spread(torch.exp2(exponent), 32)
    return {"weight": codes, "weight_scale": (exponent + 127).to(torch.uint8)}, Truth(weight)


def mxfp8(w: torch.Tensor, g: torch.Generator, module: str) -> tuple[Tensors, Truth]:
    return _mxfp8(w)


def _fp8(w: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.clamp(w / scale, -448, 448).to(torch.float8_e4m3fn)
    return codes, codes.float() * scale


def modelopt_fp8(w: torch.Tensor, g: torch.Generator, module: str) -> tuple[Tensors, Truth]:
    scale = w.abs().max() / 448
    codes, weight = _fp8(w, scale)
    rounding = 0.01 * (1 + torch.rand((), generator=g).item())
    parts = {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(rounding)}
    return parts, Truth(weight, None, parts["input_scale"].item(), "fp8")


def modelopt_fp8_channel(w: torch.Tensor, g: torch.Generator, module: str) -> tuple[Tensors, Truth]:
    scale = w.abs().amax(1, keepdim=True) / 448
    codes, weight = _fp8(w, scale)
    return {"weight": codes, "weight_scale": scale[:, 0]}, Truth(weight)


def modelopt_int4_awq(w: torch.Tensor, g: torch.Generator, module: str) -> tuple[Tensors, Truth]:
    prescale = _prescale(w.shape[1], g).bfloat16().float()
    codes, scale = _int4(w / prescale, 64)
    pairs = _nibbles(codes.T.contiguous().view(torch.uint8)).T  # two rows a byte
    weight = codes.float() * _spread(scale, 64)
    parts = {"weight": pairs, "weight_scale": scale, "pre_quant_scale": prescale.bfloat16()}
    return parts, Truth(weight, prescale)


def _int8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = w.abs().amax(1, keepdim=True) / 127
    return torch.round(w / scale).to(torch.int8), scale


def modelopt_smoothquant(w: torch.Tensor, g: torch.Generator, module: str) -> tuple[Tensors, Truth]:
    prescale = _prescale(w.shape[1], g)
    codes, scale = _int8(w / prescale)
    rounding = torch.tensor(0.03)
    parts = {
        "weight": codes,
        "weight_scale": scale[:, 0],
        "input_scale": rounding,
        "pre_quant_scale": prescale,
    }
    return parts, Truth(codes.float() * scale, prescale, rounding.item(), "int8")


def modelopt_int8(w: torch.Tensor, g: torch.Generator, module: str) -> tuple[Tensors, Truth]:
    codes, scale = _int8(w)
    return {"weight": codes, "weight_scale": scale[:, 0]}, Truth(codes.float() * scale)


def autoawq(w: torch.Tensor, g: torch.Generator, module: str) -> tuple[Tensors, Truth]:
    codes, zero, scale = _uint4(w, 32)
    weight = (codes - _spread(zero, 32)) * _spread(scale, 32)
    parts = {
        "qweight": _words(codes.T, 4, AWQ_ORDER),
        "qzeros": _words(zero.T, 4, AWQ_ORDER),
        "scales": scale.T.half(),
    }
    return parts, Truth(weight)


def gptq(w: torch.Tensor, g: torch.Generator, module: str) -> tuple[Tensors, Truth]:
    codes, scale = _int4(w, 32)
    zero = torch.full(scale.shape, 8)
    return _gptq(codes + 8, zero, scale.half().float())


def gptq_asymmetric(w: torch.Tensor, g: torch.Generator, module: str) -> tuple[Tensors, Truth]:
    return _gptq(*_uint4(w, 32))


def _gptq(codes: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor) -> tuple[Tensors, Truth]:
    weight = (codes.float() - _spread(zero, 32)) * _spread(scale, 32)
    parts = {
        "qweight": _words(codes, 4).T,
        "qzeros": _words((zero.T - 1) % 16, 4),
        "scales": scale.T.half(),
        "g_idx": torch.arange(codes.shape[1], dtype=torch.int32) // 32,
    }
    return parts, Truth(weight)


def ct_int4(w: torch.Tensor, g: torch.Generator, module: str) -> tuple[Tensors, Truth]:
    codes, scale = _int4(w, 32)
    scale = scale.bfloat16().float()
    parts = {
        "weight_packed": _words(codes + 8, 4),
        "weight_scale": scale.bfloat16(),
        "weight_shape": torch.tensor(w.shape),
    }
    return parts, Truth(codes.float() * _spread(scale, 32))


def ct_int4_asymmetric(w: torch.Tensor, g: torch.Generator, module: str) -> tuple[Tensors, Truth]:
    codes, zero, scale = _uint4(w, 32)
    parts = {
        "weight_packed": _words(codes, 4),
        "weight_scale": scale.half(),
        "weight_shape": torch.tensor(w.shape),
        "weight_zero_point": _words(zero.T, 4).T,
    }
    return parts, Truth((codes - _spread(zero, 32)) * _spread(scale, 32))


def ct_int8_packed(w: torch.Tensor, g: torch.Generator, module: str) -> tuple[Tensors, Truth]:
    codes, scale = _int8(w)
    parts = {
        "weight_packed": _words(codes.to(torch.int64) + 128, 8),
        "weight_scale": scale,
        "weight_shape": torch.tensor(w.shape),
    }
    return parts, Truth(codes.float() * scale)


def ct_int8(w: torch.Tensor, g: torch.Generator, module: str) -> tuple[Tensors, Truth]:
    codes, scale = _int8(w)
    return {"weight": codes, "weight_scale": scale}, Truth(codes.float() * scale)


def ct_int8_static(w: torch.Tensor, g: torch.Generator, module: str) -> tuple[Tensors, Truth]:
    parts, truth = ct_int8(w, g, module)
    parts["input_scale"] = torch.tensor([0.03])
    return parts, Truth(truth.weight, None, parts["input_scale"].item(), "int8")


def ct_fp8(w: torch.Tensor, g: torch.Generator, module: str) -> tuple[Tensors, Truth]:
    scale = (w.abs().amax(1, keepdim=True) / 448).bfloat16().float()
    codes, weight = _fp8(w, scale)
    return {"weight": codes, "weight_scale": scale.bfloat16()}, Truth(weight)


def fp8_square(w: torch.Tensor, g: torch.Generator, module: str) -> tuple[Tensors, Truth]:
    n, k = w.shape
    padded = torch.zeros(-(-n // 128) * 128, k)
    padded[:n] = w
    squares = padded.reshape(-1, 128, k // 128, 128)
    scale = squares.abs().amax((1, 3)) / 448
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:n]
    codes, weight = _fp8(w, spread)
    return {"weight": codes, "weight_scale_inv": scale}, Truth(weight)


def ct_fp8_square(w: torch.Tensor, g: torch.Generator, module: str) -> tuple[Tensors, Truth]:
    parts, truth = fp8_square(w, g, module)
    return {"weight": parts["weight"], "weight_scale": parts["weight_scale_inv"]}, truth


def ct_nvfp4(w: torch.Tensor, g: torch.Generator, module: str) -> tuple[Tensors, Truth]:
    codes, scale, whole, _ = _nvfp4(w)
    divisor = 1 / whole
    parts = {
        "weight_packed": _nibbles(codes),
        "weight_scale": scale,
        "weight_global_scale": divisor.reshape(1),
        "input_global_scale": torch.tensor([100.0]),
    }
    return parts, Truth(E2M1[codes.long()] * _spread(scale, 16) / divisor)


def _modelopt(algorithm: str, **fields: Any) -> dict[str, Any]:
    return {
        "quant_algo": algorithm,
        "kv_cache_quant_algo": None,
        "exclude_modules": ["lm_head"],
    } | fields


def _ct(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    whole = {"symmetric": True, "dynamic": False, "observer": "memoryless_minmax"} | weights
    group = {"targets": ["Linear"], "weights": whole, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group | {"output_activations": None, "format": form}},
    }


_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
_INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
_TENSOR = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": True}
_FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
_FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
_MX = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}

LAYOUTS: dict[str, tuple[Maker, dict[str, Any]]] = {
    "modelopt-nvfp4": (modelopt_nvfp4, _modelopt("NVFP4", group_size=16)),
    "modelopt-nvfp4-awq": (modelopt_nvfp4_awq, _modelopt("NVFP4_AWQ", group_size=16)),
    "modelopt-mxfp8": (mxfp8, _modelopt("MXFP8", group_size=32)),
    "modelopt-fp8": (modelopt_fp8, _modelopt("FP8")),
    "modelopt-fp8-channel": (modelopt_fp8_channel, _modelopt("FP8_PER_CHANNEL_PER_TOKEN")),
    "modelopt-int4-awq": (
        modelopt_int4_awq,
        _modelopt("W4A16_AWQ", group_size=64, has_zero_point=False, pre_quant_scale=True),
    ),
    "modelopt-smoothquant": (modelopt_smoothquant, _modelopt("W8A8_SQ_PER_CHANNEL")),
    "modelopt-int8": (modelopt_int8, _modelopt("W8A16")),
    "autoawq": (autoawq, _AWQ),
    "gptq": (gptq, _GPTQ),
    "gptq-asymmetric": (gptq_asymmetric, _GPTQ | {"sym": False}),
    "ct-int4": (ct_int4, _ct("pack-quantized", _INT4)),
    "ct-int4-asymmetric": (
        ct_int4_asymmetric,
        _ct("pack-quantized", _INT4 | {"symmetric": False}),
    ),
    "ct-int8-packed": (ct_int8_packed, _ct("pack-quantized", _INT8)),
    "ct-int8": (ct_int8, _ct("int-quantized", _INT8, _TOKEN)),
    "ct-int8-static": (ct_int8_static, _ct("int-quantized", _INT8, _TENSOR)),
    "ct-fp8": (ct_fp8, _ct("float-quantized", _FP8, _TOKEN | {"type": "float"})),
    "fp8": (
        fp8_square,
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
        },
    ),
    "ct-fp8-square": (
        ct_fp8_square,
        _ct("float-quantized", _FP8 | {"strategy": "block", "block_structure": [128, 128]}),
    ),
    "ct-nvfp4": (
        ct_nvfp4,
        _ct("nvfp4-pack-quantized", _FP4, _FP4 | {"dynamic": "local", "symmetric": True}),
    ),
    "ct-mxfp8": (mxfp8, _ct("mxfp8-quantized", _MX, _MX | {"dynamic": True, "symmetric": True})),
}
