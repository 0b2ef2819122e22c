"""Real, tiny Hugging Face checkpoints with random weights, made by transformers and tokenizers.

Owns what a checkpoint directory looks like; knows nothing of Remora. Import it inside tests only:
it needs torch.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# The numbers of Llama 3.2, shortened so that a context of a few hundred tokens crosses the bands.
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

YARN_SCALING = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE_SCALING = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [1.5 + 0.7 * i for i in range(6)],
    "original_max_position_embeddings": 64,
}

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# What a tiny model of a family says beside what all of them say.
PRESETS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 24},
    "ministral": {
        "head_dim": 16,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "ministral3": {
        "head_dim": 16,
        "rope_parameters": YARN_SCALING
        | {"rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 64},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": _EXPERTS | {"head_dim": 16, "norm_topk_prob": True},
    "gemma": {"head_dim": 16},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 6.0,
    },
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "phi3": {
        "original_max_position_embeddings": 64,
        "rope_parameters": LONGROPE_SCALING | {"rope_theta": 1e4, "partial_rotary_factor": 0.75},
        "sliding_window": 100,
    },
    "smollm3": {"no_rope_layer_interval": 2},
    "granite": {
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.4,
        "logits_scaling": 3.0,
    },
    "stablelm": {
        "rms_norm_eps": None,  # not a field of it
        "layer_norm_eps": 1e-5,
        "use_qkv_bias": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.25,
        },
    },
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
}
PLUS_ONE = ("gemma", "gemma2", "gemma3_text")  # they store w - 1 of a norm's weight w

TEXT = (
    "The remora rides the shark and eats what falls from its mouth. "
    "A small adapter changes what a large model does. "
    "Pumps, valves and belts: check the pressure, then the temperature, then call the operator. "
    "def add(a, b): return a + b\n"
    "0 1 2 3 4 5 6 7 8 9 10 20 30 40 50 60 70 80 90 100; naïve café – 東京 ☂\n"
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3_CHAT = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SPECIAL: dict[str, tuple[str, ...]] = {
    "llama": (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
    ),
    "qwen": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
}


def make_checkpoint(
    directory: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    tied: bool = False,
    shards: int = 1,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    intermediate: int = 96,
    vocab: int = 320,
    rope_scaling: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """Writes config, weights, tokenizer and generation config into `directory`; returns it.

    `family` is a model_type; PRESETS says what is its own. `rope_scaling` takes LLAMA3_SCALING.
    `shards` > 1 gives at least two shards and an index.
    Further keywords go into the configuration as they are. The same arguments give the same bytes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    eos, bos, pad = _make_tokenizer(directory, family, vocab)
    rope = {"rope_type": "default", "rope_theta": 10000.0, **(rope_scaling or {})}
    settings: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_parameters": rope,
        "eos_token_id": eos,
        "bos_token_id": bos,
        "pad_token_id": pad,
        "dtype": DTYPES[dtype],
    }
    preset = PRESETS.get(family, {})
    settings = {k: v for k, v in (settings | preset).items() if k not in preset or v is not None}
    if rope_scaling is not None:
        settings["rope_parameters"] = rope
    if head_dim is not None:
        settings["head_dim"] = head_dim
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings | config))
    _randomize(model, seed, norm=0.0 if family in PLUS_ONE else 1.0)
    model.to(DTYPES[dtype])
    model.generation_config.eos_token_id = eos
    model.generation_config.pad_token_id = pad
    model.save_pretrained(directory, max_shard_size=_shard_bytes(model, shards))
    return directory


def make_multimodal(
    directory: Path, model_type: str, text: str, *, seed: int = 0, **config: Any
) -> Path:
    """A multimodal checkpoint around a tiny `text` model, as transformers saves one; further
    keywords go into the text part's configuration. "gemma3", "mistral3", "llava", "qwen2_vl" and
    "qwen2_5_vl" are known."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    directory.mkdir(parents=True, exist_ok=True)
    eos, bos, pad = _make_tokenizer(directory, text, 320)
    settings: dict[str, Any] = {
        "model_type": text,
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 320,
        "max_position_embeddings": 512,
        "eos_token_id": eos,
        "bos_token_id": bos,
        "pad_token_id": pad,
        **PRESETS.get(text, {}),
        **config,
    }
    outer = AutoConfig.for_model(
        model_type, text_config=settings, vision_config=_VISION[model_type], **_IMAGES[model_type]
    )
    model = AutoModelForImageTextToText.from_config(outer)
    _randomize(model, seed, norm=0.0 if text in PLUS_ONE else 1.0)
    model.generation_config.eos_token_id = eos
    model.generation_config.pad_token_id = pad
    model.save_pretrained(directory)
    return directory


_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
_QWEN_TOWER = {"depth": 1, "num_heads": 2, "patch_size": 14}
_VISION: dict[str, dict[str, Any]] = {
    "gemma3": _TOWER | {"model_type": "siglip_vision_model"},
    "mistral3": _TOWER | {"model_type": "pixtral", "head_dim": 16},
    "llava": _TOWER | {"model_type": "clip_vision_model", "projection_dim": 32},
    "qwen2_vl": _QWEN_TOWER | {"embed_dim": 32, "hidden_size": 64},
    "qwen2_5_vl": _QWEN_TOWER | {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48},
}
_IMAGES: dict[str, dict[str, Any]] = {
    "gemma3": {"mm_tokens_per_image": 4},
    "mistral3": {"tie_word_embeddings": False},
    "llava": {},
    "qwen2_vl": {},
    "qwen2_5_vl": {},
}


def use_old_config(directory: Path) -> None:
    """Rewrites config.json as transformers 4 wrote it: rope_theta, rope_scaling, torch_dtype."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2))


def edit_config(directory: Path, **changes: Any) -> None:
    """Sets keys of config.json, as a hand would."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2))


def _randomize(model: torch.nn.Module, seed: int, norm: float) -> None:
    """Weights of a scale that keeps activations near 1; norms, around `norm`, and biases far from
    trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32)
            if name.endswith(".bias"):
                p.copy_(0.3 * noise)
            elif "norm" in name:
                p.copy_(norm + 0.2 * noise)
            elif "embed" in name:
                p.copy_(0.5 * noise)
            else:
                p.copy_(noise / math.sqrt(p.shape[-1]))


def _shard_bytes(model: torch.nn.Module, shards: int) -> int:
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    return total * 2 if shards == 1 else -(-total // shards)


def _make_tokenizer(directory: Path, family: str, vocab: int) -> tuple[list[int], int | None, int]:
    """Byte-level BPE with the family's special tokens; ids of eos, bos and pad."""
    from transformers import PreTrainedTokenizerFast

    special = SPECIAL["llama" if family == "llama" else "qwen"]
    if vocab < 256 + len(special):
        raise ValueError(f"a byte-level vocabulary needs at least {256 + len(special)} entries")
    fast = _train(special, vocab)
    if family == "llama":
        first = fast.token_to_id("<|begin_of_text|>")
        fast.post_processor = processors.TemplateProcessing(
            single="<|begin_of_text|> $A",
            pair="<|begin_of_text|> $A <|begin_of_text|> $B",
            special_tokens=[("<|begin_of_text|>", first)],
        )
        names = {"bos_token": special[0], "eos_token": "<|eot_id|>", "pad_token": special[1]}
        template, eos = LLAMA3_CHAT, ["<|end_of_text|>", "<|eot_id|>"]
    else:
        names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        template, eos = CHATML, ["<|im_end|>", "<|endoftext|>"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = PreTrainedTokenizerFast(tokenizer_object=fast, **names)
        wrapped.chat_template = template
        wrapped.save_pretrained(directory)
    ids = {n: fast.token_to_id(t) for n, t in names.items()}
    return [fast.token_to_id(t) for t in eos], ids.get("bos_token"), ids["pad_token"]


def _train(special: tuple[str, ...], vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer
