"""What to say of a model_type that no family computes: the nearest one that is supported. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

# Whose names say nothing of what they are near to.
_KIN = {
    "baichuan": "llama",
    "chatglm": "glm",
    "deepseek_v2": "qwen2_moe",
    "deepseek_v3": "qwen2_moe",
    "exaone": "llama",
    "exaone4": "qwen3",
    "falcon": "llama",
    "gemma3n": "gemma3_text",
    "gemma4": "gemma3_text",
    "gpt_oss": "mixtral",
    "internlm2": "llama",
    "internlm3": "llama",
    "llama4": "mixtral",
    "olmo": "olmo2",
    "olmoe": "qwen3_moe",
    "minimax": "mixtral",
    "phi": "phi3",
    "phimoe": "mixtral",
    "qwen": "qwen2",
    "qwen3_next": "qwen3_moe",
    "starcoder2": "mistral",
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_CLOSE = 0.75  # of difflib's ratio: a slip of the pen, not a resemblance


def nearest(model_type: str, config: Mapping[str, Any], known: Collection[str]) -> str:
    """By kinship, by the beginning of its name, by all of it, or by whether it mixes experts."""
    found = _named(model_type.removesuffix("_text"), known)
    mixes = any(config.get(key) for key in _EXPERTS)
    if found is None:
        return "mixtral" if mixes else "llama"
    return f"{found}_moe" if mixes and f"{found}_moe" in known else found


def _named(model_type: str, known: Collection[str]) -> str | None:
    begins = [name for name in (*known, *_KIN) if model_type.startswith(name)]
    if begins:
        longest = max(begins, key=len)
        return _KIN.get(longest, longest)
    close = difflib.get_close_matches(model_type, known, n=1, cutoff=_CLOSE)
    return close[0] if close else None
