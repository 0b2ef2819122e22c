"""Random configurations of every family, within what its checkpoints may say, saved as the versions
of transformers and other tools save them. Seeded: a draw is known by family and number."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import make_checkpoint

ORIGINAL = 24  # of ropes that are scaled: prompts are longer
Config = dict[str, Any]


class Draw:
    def __init__(self, family: str, number: int) -> None:
        self.family = family
        self._random = np.random.default_rng([number, zlib.crc32(family.encode())])

    def one(self, *values: Any) -> Any:
        return values[int(self._random.integers(len(values)))]

    def flag(self) -> bool:
        return bool(self._random.integers(2))

    def number(self, least: float, most: float) -> float:
        return round(float(self._random.uniform(least, most)), 3)

    def numbers(self, count: int, least: float, most: float) -> list[float]:
        return [self.number(least, most) for _ in range(count)]

    def whole(self, least: int, most: int) -> int:
        return int(self._random.integers(least, most + 1))


def checkpoint(directory: Path, family: str, number: int) -> Path:
    """A checkpoint of the draw, in one of the layouts in which they are saved."""
    draw = Draw(family, number)
    config = settings(draw)
    shards = draw.one(1, 1, 3)
    dtype = draw.one("float32", "float32", "bfloat16", "float16")
    made = make_checkpoint(directory, family, seed=number, shards=shards, dtype=dtype, **config)
    _relayout(draw, made, config.get("tied", False))
    return made


def settings(draw: Draw) -> Config:
    heads = draw.one(1, 2, 3, 4, 6)
    kv_heads = draw.one(*(n for n in range(1, heads + 1) if heads % n == 0))
    # A part of a head is an even number of dimensions.
    head_dim = draw.one(*((8, 16, 24, 32) if draw.family in _PARTIAL else (8, 10, 12, 16, 32)))
    config: Config = {
        "layers": draw.whole(1, 4),
        "heads": heads,
        "kv_heads": kv_heads,
        "hidden": heads * head_dim,
        "intermediate": draw.whole(3, 12) * 8 + draw.one(0, 0, 3),
        "vocab": draw.one(320, 321, 384),
        "tied": draw.flag(),
        "hidden_act": draw.one("silu", "silu", "gelu", "gelu_pytorch_tanh"),
        "rms_norm_eps": draw.one(1e-6, 1e-5, 1e-3),
        "max_position_embeddings": draw.one(200, 512),
    }
    if draw.family in _OWN_HEAD_DIM:
        config |= {"head_dim": head_dim, "hidden": heads * draw.one(8, 12, 24, head_dim)}
    config["rope_parameters"] = rope(draw, _partial(draw))
    own = _OWN.get(draw.family)
    return config | (own(draw, config) if own else {})


_OWN_HEAD_DIM = {
    "llama",
    "mistral",
    "ministral",
    "ministral3",
    "mixtral",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
}


_PARTIAL = ("stablelm", "glm", "glm4", "phi3")


def _partial(draw: Draw) -> float | None:
    return draw.one(0.25, 0.5, 1.0) if draw.family in _PARTIAL else None


def rope(draw: Draw, partial: float | None = None) -> Config:
    kind = draw.one("default", "linear", "llama3", "yarn")
    table: Config = {"rope_type": kind, "rope_theta": draw.one(1e4, 5e5, 1e6)}
    if partial is not None:
        table["partial_rotary_factor"] = partial
    if kind in ("linear", "llama3", "yarn"):
        table["factor"] = draw.one(1.0, 2.0, 3.5, 8.0)
    if kind in ("llama3", "yarn"):
        table["original_max_position_embeddings"] = ORIGINAL
    if kind == "llama3":
        low = draw.number(0.5, 2.0)
        table |= {"low_freq_factor": low, "high_freq_factor": low + draw.number(0.5, 4.0)}
    if kind == "yarn":
        table |= _yarn(draw)
    return table


def _yarn(draw: Draw) -> Config:
    table: Config = {}
    if draw.flag():
        slow = draw.number(0.5, 2.0)
        table |= {"beta_slow": slow, "beta_fast": slow * draw.number(2, 16)}
    if draw.flag():
        table["truncate"] = draw.flag()
    how = draw.whole(0, 2)
    if how == 1:
        table["attention_factor"] = draw.number(0.5, 2.0)
    if how == 2:
        table |= {"mscale": draw.number(0.5, 1.5), "mscale_all_dim": draw.number(0.5, 1.5)}
    return table


def _layer_types(draw: Draw, config: Config) -> list[str]:
    return [draw.one("sliding_attention", "full_attention") for _ in range(config["layers"])]


def _qwen_window(draw: Draw, config: Config) -> Config:
    found: Config = {
        "use_sliding_window": draw.flag(),
        "sliding_window": draw.whole(1, 60),
        "max_window_layers": draw.whole(0, config["layers"]),
    }
    if draw.family != "qwen3_moe" and draw.flag():
        found["layer_types"] = _layer_types(draw, config) if found["use_sliding_window"] else None
    return {k: v for k, v in found.items() if v is not None}


def _experts(draw: Draw, config: Config) -> Config:
    count = draw.whole(1, 6)
    return {
        "num_experts": count,
        "num_experts_per_tok": draw.whole(1, count),
        "moe_intermediate_size": draw.whole(1, 3) * 16,
        "norm_topk_prob": draw.flag(),
        "decoder_sparse_step": draw.whole(1, 2),
        "mlp_only_layers": [i for i in range(config["layers"]) if draw.whole(0, 3) == 0],
    }


def _llama(draw: Draw, config: Config) -> Config:
    return {"attention_bias": draw.flag(), "mlp_bias": draw.flag()}


def _mistral(draw: Draw, config: Config) -> Config:
    return {"sliding_window": draw.one(None, draw.whole(1, 60))}


def _ministral(draw: Draw, config: Config) -> Config:
    return {"sliding_window": draw.whole(1, 60), "layer_types": _layer_types(draw, config)}


def _ministral3(draw: Draw, config: Config) -> Config:
    table = {"rope_type": "yarn", "rope_theta": 1e4, "factor": draw.one(2.0, 8.0)}
    table |= {"original_max_position_embeddings": ORIGINAL, **_yarn(draw)}
    table["llama_4_scaling_beta"] = draw.number(0.05, 0.5)
    return {"rope_parameters": table, **_mistral(draw, config)}


def _mixtral(draw: Draw, config: Config) -> Config:
    count = draw.whole(1, 6)
    experts = {"num_local_experts": count, "num_experts_per_tok": draw.whole(1, count)}
    # transformers multiplies groups of experts by kernels that want whole vectors.
    return experts | {"intermediate": draw.whole(1, 6) * 16} | _mistral(draw, config)


def _qwen2_moe(draw: Draw, config: Config) -> Config:
    shared = {"shared_expert_intermediate_size": draw.whole(1, 4) * 16, "qkv_bias": draw.flag()}
    return shared | _experts(draw, config) | _qwen_window(draw, config)


def _qwen3(draw: Draw, config: Config) -> Config:
    return {"attention_bias": draw.flag(), **_qwen_window(draw, config)}


def _qwen3_moe(draw: Draw, config: Config) -> Config:
    return _qwen3(draw, config) | _experts(draw, config)


def _gemma(draw: Draw, config: Config) -> Config:
    return {"attention_bias": draw.flag(), "hidden_act": "gelu_pytorch_tanh"}


def _gemma2(draw: Draw, config: Config) -> Config:
    return {
        "attention_bias": draw.flag(),
        "hidden_activation": config["hidden_act"],
        "query_pre_attn_scalar": draw.whole(4, 64),
        "sliding_window": draw.whole(1, 60),
        "attn_logit_softcapping": draw.one(None, draw.number(2, 60)),
        "final_logit_softcapping": draw.one(None, draw.number(2, 60)),
        "layer_types": _layer_types(draw, config),
    }


def _gemma3(draw: Draw, config: Config) -> Config:
    tables = {kind: rope(draw) for kind in ("full_attention", "sliding_attention")}
    for table in tables.values():
        table.pop("truncate", None)
    return _gemma2(draw, config) | {"rope_parameters": tables, "attn_logit_softcapping": None}


def _phi3(draw: Draw, config: Config) -> Config:
    table = {"rope_type": "default", "rope_theta": draw.one(1e4, 2.5e5)}
    table["partial_rotary_factor"] = draw.one(0.5, 1.0)
    pairs = int(config["hidden"] // config["heads"] * table["partial_rotary_factor"]) // 2
    if draw.flag():
        table |= {
            "rope_type": "longrope",
            "short_factor": draw.numbers(pairs, 1.0, 2.0),
            "long_factor": draw.numbers(pairs, 1.0, 9.0),
            "original_max_position_embeddings": ORIGINAL,
        }
        if draw.flag():
            table[draw.one("factor", "attention_factor")] = draw.number(0.8, 4.0)
    return {
        "rope_parameters": table,
        "original_max_position_embeddings": ORIGINAL,
        **_mistral(draw, config),
    }


def _smollm3(draw: Draw, config: Config) -> Config:
    found = _llama(draw, config)
    found |= {"use_sliding_window": draw.flag(), "sliding_window": draw.whole(1, 60)}
    if draw.flag():
        found["no_rope_layers"] = [draw.whole(0, 1) for _ in range(config["layers"])]
    else:
        found["no_rope_layer_interval"] = draw.whole(1, 4)
    return found


def _granite(draw: Draw, config: Config) -> Config:
    scales = ("embedding_multiplier", "attention_multiplier", "residual_multiplier")
    found = {scale: draw.number(0.1, 4) for scale in scales}
    return _llama(draw, config) | found | {"logits_scaling": draw.number(0.3, 9)}


def _olmo2(draw: Draw, config: Config) -> Config:
    return {"attention_bias": draw.flag()}


def _stablelm(draw: Draw, config: Config) -> Config:
    return {
        "rms_norm_eps": None,
        "layer_norm_eps": draw.one(1e-6, 1e-5, 1e-3),
        "use_qkv_bias": draw.flag(),
        "qk_layernorm": draw.flag(),
        "use_parallel_residual": draw.flag(),
    }


def _glm(draw: Draw, config: Config) -> Config:
    return {"attention_bias": draw.flag()}


_OWN: dict[str, Callable[[Draw, Config], Config]] = {
    "llama": _llama,
    "mistral": _mistral,
    "ministral": _ministral,
    "ministral3": _ministral3,
    "mixtral": _mixtral,
    "qwen2": _qwen_window,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "smollm3": _smollm3,
    "granite": _granite,
    "olmo2": _olmo2,
    "stablelm": _stablelm,
    "glm": _glm,
    "glm4": _glm,
}


def _relayout(draw: Draw, directory: Path, tied: bool) -> None:
    """As other versions and tools save: words of transformers 4, a tied head stored beside the
    embedding, some tensors in another precision, no generation config."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    if draw.flag():
        config["torch_dtype"] = config.pop("dtype", None)
    if draw.flag():
        (directory / "generation_config.json").unlink()
    if draw.flag():
        _old_rope(config)
    path.write_text(json.dumps(config))
    files = sorted(directory.glob("*.safetensors"))
    if len(files) == 1 and draw.flag():
        tensors = load_file(files[0])
        if tied and "model.embed_tokens.weight" in tensors:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        for name in list(tensors):
            if "norm" in name and tensors[name].dtype is torch.bfloat16:
                tensors[name] = tensors[name].float()  # exact in the wider type
        save_file(tensors, files[0], {"format": "pt"})


def _old_rope(config: Config) -> None:
    """rope_theta beside rope_scaling, and partial_rotary_factor beside both."""
    table = config.get("rope_parameters")
    if not isinstance(table, dict) or "full_attention" in table:
        return
    if "llama_4_scaling_beta" in table:  # newer than the old words
        return
    del config["rope_parameters"]
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in table:
            config[key] = table.pop(key)
    kind = table.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **table}
