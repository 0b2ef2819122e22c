"""Makes random adapters for any checkpoint and records what transformers + peft answer with them:
`python -m examples.demo.reference CHECKPOINT OUT`.

    OUT/adapters/alpha            rank 8 on all seven projections
    OUT/adapters/beta-1, beta-2   two revisions: rank 4, rsLoRA, on q and v
    OUT/expected.json             prompts, and for each variant the greedy tokens with their logits

Owns the reference (float32, greedy). Knows nothing of Remora.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

MAX_TOKENS = 12
# How far an adapter moves a projection, as a share of the projection's own norm.
STRENGTH = 0.3
PROMPTS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Write one sentence about the sea.",
    "How many legs does a spider have?",
    "Say hello in Italian.",
    "What do bees make?",
)
ADAPTERS = {
    "alpha": LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    "beta-1": LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj"]),
    "beta-2": LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj"]),
}
MIX = "alpha+beta-1"  # both at weight 1


def add_random_adapters(model: Any) -> PeftModel:
    """The model with all ADAPTERS beside each other, none of them trained and none trivial."""
    (first, config), *others = ADAPTERS.items()
    adapted = get_peft_model(model, config, adapter_name=first)
    for name, config in others:
        adapted.add_adapter(name, config)
    generator = torch.Generator().manual_seed(11)
    for name in ADAPTERS:
        for module in adapted.modules():
            if isinstance(module, LoraLayer) and name in module.lora_A:
                _randomize(module, name, generator)
    return adapted


def _randomize(module: Any, name: str, generator: torch.Generator) -> None:
    """A and B so that |scaling B A| = STRENGTH |W|."""
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    weight = module.get_base_layer().weight
    with torch.no_grad():
        a.copy_(torch.randn(a.shape, generator=generator))
        b.copy_(torch.randn(b.shape, generator=generator))
        moved = module.scaling[name] * (b @ a).norm()
        b.mul_(STRENGTH * weight.norm() / moved)


def greedy(model: Any, prompt: list[int], stop: set[int]) -> dict[str, list[float]]:
    """Tokens up to and with the first of `stop`, at most MAX_TOKENS, each with its logit and its
    lead over the next one."""
    ids, cache = torch.tensor([prompt]), None
    found: dict[str, list[float]] = {"ids": [], "logit": [], "margin": []}
    for _ in range(MAX_TOKENS):
        with torch.no_grad():
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        (best, second), (token, _) = (x.tolist() for x in output.logits[0, -1].topk(2))
        found["ids"].append(token)
        found["logit"].append(best)
        found["margin"].append(best - second)
        if token in stop:
            break
        ids, cache = torch.tensor([[token]]), output.past_key_values
    return found


@contextmanager
def variant_of(model: PeftModel, variant: str) -> Iterator[None]:
    """`base`, an adapter's name, or several joined by "+": their sum."""
    with model.disable_adapter() if variant == "base" else nullcontext():
        if variant != "base":
            model.base_model.set_adapter(variant.split("+"))
        yield


def record(checkpoint: Path, out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    adapted = add_random_adapters(model)
    adapted.save_pretrained(out / "adapters")
    chat = bool(tokenizer.chat_template)
    prompts = [_ids(tokenizer, prompt, chat) for prompt in PROMPTS]
    stop = _stop_tokens(model, tokenizer)
    answers = {}
    for variant in ("base", *ADAPTERS, MIX):
        with variant_of(adapted, variant):
            answers[variant] = [greedy(adapted, ids, stop) for ids in prompts]
    document = {"prompts": PROMPTS, "chat": chat, "max_tokens": MAX_TOKENS, "answers": answers}
    (out / "expected.json").write_text(json.dumps(document, indent=1) + "\n")


def _ids(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    if not chat:
        return list(tokenizer.encode(prompt))
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


def _stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    configured = model.generation_config.eos_token_id
    if configured is None:
        configured = tokenizer.eos_token_id
    return set(configured) if isinstance(configured, list) else {configured}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.demo.reference")
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face checkpoint directory")
    parser.add_argument("out", type=Path, help="folder to write, made when missing")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    # peft asks transformers for an attribute under its old name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    record(options.checkpoint, options.out)
    print(f"recorded {len(PROMPTS)} prompts for base, {', '.join(ADAPTERS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
