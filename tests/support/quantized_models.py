"""What quantized checkpoints mean, as torch models, and checkpoints with smoothing folded in."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.support.quantized import Made, Truth


def fold(source: Path, out: Path, *, projections: bool) -> Path:
    """A float checkpoint that computes the same as `source`, smoothing folded in as AWQ does it:
    random positive scales from norms into q, k, v and gate, up; with `projections` also from v into
    o and from up into down."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    generator = torch.Generator().manual_seed(11)

    def into(scale_of: list[str], readers: list[str]) -> None:
        """Multiplies the outputs of `scale_of` and divides the inputs of `readers`."""
        scale = 0.5 + 1.5 * torch.rand(tensors[readers[0]].shape[1], generator=generator)
        for name in scale_of:
            tensors[name] *= scale if tensors[name].ndim == 1 else scale[:, None]
        for name in readers:
            tensors[name] /= scale

    for layer in range(2):
        at = f"model.layers.{layer}."
        attention = [f"{at}self_attn.{p}_proj.weight" for p in "qkv"]
        into([f"{at}input_layernorm.weight"], attention)
        gate, up, down = (f"{at}mlp.{p}_proj.weight" for p in ("gate", "up", "down"))
        into([f"{at}post_attention_layernorm.weight"], [gate, up])
        if projections:
            v = f"{at}self_attn.v_proj"
            into([f"{v}.weight", f"{v}.bias"], [f"{at}self_attn.o_proj.weight"])
            into([up], [down])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


class QuantLinear(torch.nn.Linear):
    """A Linear that computes a Truth; peft wraps it like any other."""

    truth: Truth

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x, truth = input, self.truth
        if truth.prescale is not None:
            x = x * truth.prescale
        if truth.rounding == "int8":
            x = torch.clamp(torch.round(x / truth.input_scale), -128, 127) * truth.input_scale
        elif truth.rounding == "fp8":
            scaled = torch.clamp(x / truth.input_scale, -448, 448)
            x = scaled.to(torch.float8_e4m3fn).float() * truth.input_scale
        return torch.nn.functional.linear(x, truth.weight, self.bias)


def reference(source: Path, made: Made) -> torch.nn.Module:
    """transformers' model of `source` in float32 with every quantized module a QuantLinear."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    modules = dict(model.named_modules())
    for name, truth in made.modules.items():
        modules[name].__class__ = QuantLinear
        modules[name].truth = truth
    return model
