"""What a TensorRT engine is measured beside: transformers with PEFT's adapter, the same shape."""

from __future__ import annotations

import statistics
import time
from typing import Any

from remora_contract.decoder import DecoderSpec

_FORMS = ("plain, no CUDA graphs", "torch.compile")


def transformers_rates(
    spec: DecoderSpec, rank: int, past: int, steps: int, *, on_cpu: bool = False
) -> list[tuple[str, float]]:
    """Form and tokens a second of decode steps, batch 1; nothing where torch sees no GPU.
    Raises ImportError."""
    import torch

    if not (on_cpu or torch.cuda.is_available()):
        return []
    model = _model(spec, rank, "cpu" if on_cpu else "cuda")
    forms = _FORMS[:1] if on_cpu else _FORMS  # compiling takes minutes and shows nothing there
    rates = []
    for form in forms:
        called = torch.compile(model, mode="default") if form == "torch.compile" else model
        rates.append((form, 1 / _step(called, model, past, steps)))
    return rates


def _model(spec: DecoderSpec, rank: int, device: str) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    kind = Qwen2Config if spec.family == "qwen2" else LlamaConfig
    config = kind(
        hidden_size=spec.hidden,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        intermediate_size=spec.intermediate,
        vocab_size=spec.vocab,
        tie_word_embeddings=spec.tied_embeddings,
    )
    dtype = torch.float32 if device == "cpu" else torch.float16
    model = AutoModelForCausalLM.from_config(config).to(device=device, dtype=dtype)
    lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora).eval()


def _step(called: Any, model: Any, past: int, steps: int) -> float:
    """Median seconds of a step after `past` tokens, warm."""
    import torch
    from transformers import StaticCache

    device = next(model.parameters()).device
    cache = StaticCache(config=model.config, max_cache_len=past + steps + 8)
    token = torch.ones((1, 1), dtype=torch.long, device=device)
    times = []
    with torch.inference_mode():
        prompt = torch.arange(1, past + 1, device=device)[None]
        model(input_ids=prompt, past_key_values=cache, use_cache=True)
        for _ in range(steps + 5):
            begun = time.perf_counter()
            logits = called(input_ids=token, past_key_values=cache, use_cache=True).logits
            int(logits[0, -1].argmax())  # waits for the device
            times.append(time.perf_counter() - begun)
    return statistics.median(times[5:])
