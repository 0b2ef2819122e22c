"""Every field that transformers knows or its models read changes our decoder, is refused, or
changes no answer: found by changing them one by one, so that a new version's field is noticed.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    masking_utils,
    modeling_rope_utils,
    modeling_utils,
)
from transformers.integrations import moe

from remora_build.families import FAMILIES, read_config
from remora_contract.errors import RemoraError
from tests.buildhost.reference import load_reference
from tests.buildhost.test_multimodal import MODELS, make
from tests.support.checkpoints import make_checkpoint

# Tables with tests of their own, sizes that every tensor follows, what is no field of a file.
ELSEWHERE = re.compile(
    "model_type|architectures|rope_(parameters|scaling)|(torch_)?dtype|transformers_version"
    "|quantization_config|vocab_size|hidden_size|num_hidden_layers|_attn_implementation|id2label"
    "|return_dict|(bos|eos|pad)_token_id|vision_config|text_config"
)
READ = re.compile(r'config\.(\w+)|getattr\(\s*(?:self\.|effective_)?config,\s*"(\w+)"')
NO_VALUE = (TypeError, ValueError, AttributeError, StrictDataclassError)  # of this field
TYING = ("tie_word_embeddings",)  # what a stored head means to it: test_multimodal
OFTEN = ("qwen2_moe", "gemma3_text", "phi3", "smollm3")  # the rest in the long run
TOKENS = torch.arange(1, 101)[None] * 7919 % 320


def fields(config: Any, model: type) -> list[str]:
    modeling = sys.modules[model.__module__]
    sources = (modeling, masking_utils, modeling_rope_utils, modeling_utils, moe)
    read = {a or b for m in sources for a, b in READ.findall(inspect.getsource(m))}
    found = {*config.to_dict(), *read}
    return sorted(n for n in found if not ELSEWHERE.fullmatch(n) and not callable_of(config, n))


def callable_of(config: Any, name: str) -> bool:
    return callable(getattr(config, name, None))


def others(value: Any) -> list[Any]:
    """Values of the same kind, of which one at least means something else."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 2 * value, 1]
    if isinstance(value, float):
        return [0.9 * value + 0.01]
    if isinstance(value, str):
        return ["gelu", "silu", "relu"]
    if isinstance(value, list) and value:
        flipped = [1 - v if isinstance(v, int) else v for v in value]
        return [value[::-1], value[:1] * len(value), flipped]
    return [False, True, 3, 0.5, "gelu", [1, 0], ["full_attention"] * 2, ["sliding_attention"] * 2]


def answer(
    directory: Path, weights: dict[str, torch.Tensor], auto: Any = AutoModelForCausalLM
) -> torch.Tensor:
    """Raises for what transformers refuses, or has other tensors for."""
    config = AutoConfig.from_pretrained(directory)
    model = auto.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(weights, strict=True)
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in OFTEN else pytest.mark.slow) for f in FAMILIES]
)
def test_a_field_that_is_passed_over_changes_no_answer(tmp_path, family):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family, seed=1)
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    base, weights = read_config(checkpoint), load_reference(checkpoint).state_dict()
    said, want, seen = AutoConfig.from_pretrained(checkpoint), answer(checkpoint, weights), 0
    for name in fields(said, MODEL_FOR_CAUSAL_LM_MAPPING[type(said)]):
        for other in others(config.get(name, getattr(said, name, None))):
            path.write_text(json.dumps(config | {name: other}))
            if treated(checkpoint, base):
                continue
            try:
                have = answer(checkpoint, weights)
            except NO_VALUE:
                continue
            assert torch.equal(have, want), f"{name}: {other!r}"
            seen += 1
    assert seen > 5, "too little was compared to say anything"


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_field_around_a_text_part_that_is_passed_over_changes_no_answer(tmp_path, model):
    checkpoint = make(tmp_path, model)
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    whole = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    base, weights, said = read_config(checkpoint), whole.state_dict(), whole.config
    want, seen = answer(checkpoint, weights, AutoModelForImageTextToText), 0
    for name in fields(said, type(whole)):
        for other in others(config.get(name, getattr(said, name, None))):
            path.write_text(json.dumps(config | {name: other}))
            if name in TYING or treated(checkpoint, base):
                continue
            try:
                have = answer(checkpoint, weights, AutoModelForImageTextToText)
            except (*NO_VALUE, RuntimeError):  # other tensors of images
                continue
            assert torch.equal(have, want), f"{name}: {other!r}"
            seen += 1
    assert seen > 5, "too little was compared to say anything"


def treated(checkpoint: Path, base: Any) -> bool:
    """Whether the field is honoured or refused."""
    try:
        return read_config(checkpoint) != base
    except RemoraError:
        return True
