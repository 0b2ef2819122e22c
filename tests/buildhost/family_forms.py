"""One row a family and variant: the model_type, and what make_checkpoint says beside PRESETS."""

from __future__ import annotations

from typing import Any

from tests.support.checkpoints import LLAMA3_SCALING, YARN_SCALING

Form = tuple[str, dict[str, Any]]

SLIDING = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
LINEAR = {"rope_type": "linear", "factor": 3.0}

# One form a family, in the variant that most of its checkpoints have.
FAMILIES: dict[str, Form] = {
    name: (name, {})
    for name in (
        "llama",
        "mistral",
        "ministral",
        "ministral3",
        "mixtral",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi3",
        "smollm3",
        "granite",
        "olmo2",
        "stablelm",
        "glm",
        "glm4",
    )
}
VARIANTS: dict[str, Form] = {
    "llama-linear": ("llama", {"rope_scaling": LINEAR}),
    "llama-llama3": ("llama", {"rope_scaling": LLAMA3_SCALING}),
    "llama-yarn": ("llama", {"rope_scaling": YARN_SCALING}),
    "llama-yarn-tuned": (
        "llama",
        {
            "rope_scaling": YARN_SCALING
            | {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False, "attention_factor": 1.3}
        },
    ),
    "llama-mqa-gelu": ("llama", {"kv_heads": 1, "hidden_act": "gelu"}),
    "mistral-without-window": ("mistral", {"sliding_window": None}),
    "mistral-head-dim": ("mistral", {"head_dim": 24}),
    "ministral3-window": ("ministral3", {"sliding_window": 24}),
    "mixtral-sliding-one-active": (
        "mixtral",
        {"sliding_window": 24, "num_local_experts": 5, "num_experts_per_tok": 1},
    ),
    "qwen2moe-sparse-layers": (
        "qwen2_moe",
        SLIDING | {"layers": 3, "decoder_sparse_step": 2, "max_window_layers": 3},
    ),
    "qwen2moe-renormalized-all-active": (
        "qwen2_moe",
        {"norm_topk_prob": True, "num_experts_per_tok": 4, "qkv_bias": False},
    ),
    "qwen2moe-no-layer-mixes": ("qwen2_moe", {"mlp_only_layers": [0, 1]}),
    "qwen3moe-dense-layer-sliding": (
        "qwen3_moe",
        {
            "layers": 3,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 24,
            "norm_topk_prob": False,
        },
    ),
    "qwen2-sliding": ("qwen2", SLIDING),
    "qwen2-layer-types": (
        "qwen2",
        SLIDING | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen2-yarn-tied": ("qwen2", {"rope_scaling": YARN_SCALING, "tied": True}),
    "qwen3-sliding": ("qwen3", SLIDING),
    "gemma-biased-mqa": ("gemma", {"attention_bias": True, "kv_heads": 1}),
    "gemma2-untied": ("gemma2", {"tied": False}),
    "gemma2-without-caps": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3-all-sliding-capped": (
        "gemma3_text",
        {"layer_types": ["sliding_attention"] * 2, "final_logit_softcapping": 5.0},
    ),
    "phi3-plain": (
        "phi3",
        {"rope_scaling": {"partial_rotary_factor": 1.0}, "sliding_window": None},
    ),
    "phi3-tied-three-layers": ("phi3", {"tied": True, "layers": 3}),
    "smollm3-sliding": (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 24, "attention_bias": True},
    ),
    "smollm3-listed": ("smollm3", {"no_rope_layers": [0, 1, 1], "layers": 3, "tied": False}),
    "granite-biased-tied": (
        "granite",
        {"attention_bias": True, "mlp_bias": True, "tied": True},
    ),
    "olmo2-biased": ("olmo2", {"attention_bias": True, "kv_heads": 4}),
    "stablelm-12b": (
        "stablelm",
        {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": False},
    ),
    "stablelm-qk-norm": ("stablelm", {"qk_layernorm": True, "heads": 4, "kv_heads": 4}),
    "glm-without-bias": ("glm", {"attention_bias": False, "kv_heads": 1}),
    "glm4-sharded-bf16": ("glm4", {"shards": 3, "dtype": "bfloat16"}),
}
FORMS = FAMILIES | VARIANTS
