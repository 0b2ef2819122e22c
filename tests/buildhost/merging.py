"""Tiny checkpoints of any family, adapters with everything trained away from its start, and what
PEFT makes of the two: the reference that merged checkpoints are held against."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from remora_build.merge.adapter import Weighted
from remora_build.merge.merger import Merged, merge_adapters

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "phi3": {},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "qwen3_moe": {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "head_dim": 8,
    },
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64},
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8},
}
TOKENS = torch.arange(16)[None] % 13 + 2
Tensors = Mapping[str, torch.Tensor]


@contextmanager
def quiet() -> Iterator[None]:
    """peft and transformers warn about tying and about each other; tests make errors of it."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.utils.logging.set_verbosity(level)


def checkpoint(
    directory: Path,
    family: str = "llama",
    *,
    dtype: str = "float32",
    shards: int = 1,
    **config: Any,
) -> Path:
    """Saved by transformers with random weights; `shards` > 1 gives at least two."""
    torch.manual_seed(len(family))
    sizes = {} if family == "gpt2" else SIZES
    settings = {"vocab_size": 64, **sizes, **FAMILIES.get(family, {}), **config}
    with quiet():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
        randomize(model, seed=0)
        model.to(getattr(torch, dtype))
        total = sum(p.numel() * p.element_size() for p in model.parameters())
        model.save_pretrained(
            directory, max_shard_size=total * 2 if shards == 1 else total // shards
        )
    return directory


def adapter(
    base: Path, directory: Path, *, seed: int = 1, dtype: str = "float32", **config: Any
) -> Path:
    """Saved by PEFT, with every parameter it trains moved."""
    import peft

    fields = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, **config}
    if "target_parameters" not in fields and "target_modules" not in fields:
        fields["target_modules"] = ["q_proj", "v_proj", "down_proj"]
    with quiet():
        model = peft.get_peft_model(load(base), peft.LoraConfig(**fields))
        randomize(model, seed=seed, trained_only=True)
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_" in name:
                p.data = p.data.to(getattr(torch, dtype))
        model.save_pretrained(directory)
    return directory


def randomize(model: torch.nn.Module, *, seed: int, trained_only: bool = False) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=generator)
            if trained_only and not p.requires_grad:
                continue
            if "magnitude" in name or (p.dim() == 1 and "norm" in name):
                p.copy_(p * (1 + 0.2 * noise.abs()))
            else:
                p.copy_(noise * 0.2)


def load(directory: Path, dtype: str = "float32") -> transformers.PreTrainedModel:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype), local_files_only=True
        ).eval()


def with_adapter(base: Path, adapter_dir: Path, dtype: str = "float32") -> torch.nn.Module:
    import peft

    with quiet():
        return peft.PeftModel.from_pretrained(load(base, dtype), adapter_dir).eval()


def merged_by_peft(base: Path, adapter_dir: Path, dtype: str = "float32") -> Tensors:
    with quiet():
        return state(with_adapter(base, adapter_dir, dtype).merge_and_unload())


def combined_by_peft(base: Path, adapters: Sequence[Path], weights: Sequence[float]) -> Tensors:
    """add_weighted_adapter(combination_type="cat"), then merge_and_unload."""
    with quiet():
        model: Any = with_adapter(base, adapters[0])
        names = ["default", *(f"other{i}" for i in range(1, len(adapters)))]
        for name, directory in zip(names[1:], adapters[1:], strict=True):
            model.load_adapter(directory, adapter_name=name)
        model.add_weighted_adapter(names, list(weights), "all", combination_type="cat")
        model.set_adapter("all")
        return state(model.merge_and_unload())


def state(model: torch.nn.Module) -> Tensors:
    """Parameters by name, tied ones under both names."""
    return {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def merge(base: Path, out: Path, *adapters: Path, weights: Sequence[float] = ()) -> Merged:
    shares = weights or [1.0] * len(adapters)
    return merge_adapters(
        base, [Weighted(a, w) for a, w in zip(adapters, shares, strict=True)], out
    )


def assert_same(got: Tensors, want: Tensors, tolerance: float = 1e-6) -> None:
    assert set(got) == set(want)
    for name, tensor in want.items():
        torch.testing.assert_close(
            got[name], tensor, atol=tolerance, rtol=0, msg=partial("{}: {}".format, name)
        )


def stored(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint as it is in its files, as raw bytes."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as f:
            for name in f.keys():  # noqa: SIM118
                found[name] = f.get_tensor(name).contiguous().view(torch.uint8).numpy()
    return found
