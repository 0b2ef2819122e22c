"""Adapters of families whose modules are fused, scaled or capped: transformers + peft against the
portable graph and the device's engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from remora_agent.bank.weights import load_weights
from remora_agent.engine.protocol import MixEntry
from remora_build.export.options import ExportOptions
from remora_contract.bundle import load_bundle
from tests.buildhost.test_adapter_experts import FAMILIES as EXPERTS_FAMILIES
from tests.buildhost.test_adapter_experts import KINDS as EXPERTS_KINDS
from tests.buildhost.test_adapter_experts import WITH_EXPERTS
from tests.buildhost.test_adapter_kinds import (
    EVERYTHING,
    PROMPT,
    TOLERANCE,
    converted,
    engine_logits,
    make_world,
    reference,
    some_tokens,
    worst,
)
from tests.support.bank_feed import feed
from tests.support.portable import PortableModel

# Fused qkv and gate_up; fused gate_up; scaled embedding; scaled and capped logits; multipliers;
# norms behind the blocks; layer norms with biases.
FAMILIES = ("phi3", "glm4", "gemma3_text", "gemma2", "granite", "olmo2", "stablelm")
KINDS: dict[str, dict[str, Any]] = {
    "all linear": {"r": 3, "target_modules": "all-linear", "lora_alpha": 5},
    "dora": {"r": 3, "target_modules": "all-linear", "use_dora": True},
    "lora_bias": {"r": 2, "target_modules": "all-linear", "lora_bias": True},
    "embed and head": {"r": 3, "target_modules": ["embed_tokens", "lm_head"]},
    "tokens": {"r": 2, "target_modules": "all-linear", "trainable_token_indices": [5, 200]},
}


def check(
    tmp_path: Path, family: str, options: ExportOptions, kinds: dict[str, dict[str, Any]]
) -> None:
    tied = family in ("gemma2", "gemma3_text", "granite")
    world = make_world(tmp_path, family, tied, options)
    bundle, tokens = load_bundle(world.bundle_dir), some_tokens(2)
    plain = reference(world.checkpoint, tokens)
    for kind, settings in kinds.items():
        peft_dir, sidecar = converted(world, tmp_path, kind.replace(" ", "_"), **settings)
        wanted = reference(world.checkpoint, tokens[:1], peft_dir)
        model = PortableModel(world.bundle_dir, rows=2)
        model.adapter_feed = feed(bundle, [sidecar], [[1.0], [0.0]])
        graph = model.forced(tokens, PROMPT)
        assert worst(graph[:1], wanted) <= TOLERANCE, kind
        assert worst(graph[1:], plain[1:]) <= TOLERANCE, kind
        for engine in world.engines:
            handle = engine.add_adapter(load_weights(sidecar, bundle))
            found = engine_logits(engine, tokens, [(MixEntry(handle, 1.0),), ()])
            engine.remove_adapter(handle)

            assert worst(found[:1], wanted) <= TOLERANCE, kind
            assert worst(found[1:], plain[1:]) <= TOLERANCE, kind
            assert worst(found[:1], plain[:1]) > 20 * TOLERANCE, kind


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_adapter_answers_as_peft(family: str, tmp_path: Path) -> None:
    check(tmp_path, family, EVERYTHING, KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "stablelm"])
def test_every_kind_answers_so_in_the_legacy_dialect(family: str, tmp_path: Path) -> None:
    check(tmp_path, family, replace(EVERYTHING, dialect="legacy"), KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("family", EXPERTS_FAMILIES)
def test_adapters_on_experts_answer_so_in_the_legacy_dialect(family: str, tmp_path: Path) -> None:
    check(tmp_path, family, replace(WITH_EXPERTS, dialect="legacy"), EXPERTS_KINDS)
