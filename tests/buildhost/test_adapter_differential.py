"""Random LoraConfigs, trained (moved at random), saved and loaded by PEFT: what is carried answers
as PEFT does on the portable graph, what is merged as PEFT's model does, and what is neither is
refused by the name of a field that was drawn.

A few configurations of a few families here, many of all families with `-m slow`. A failure names
family and seed; `draw(random.Random(seed), modules)` gives the configuration back.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from remora_build.adapters.convert import convert_adapter
from remora_build.export.exporter import export_checkpoint
from remora_build.merge.adapter import Weighted
from remora_build.merge.merger import merge_adapters
from remora_contract.bundle import Bundle, load_bundle
from remora_contract.errors import AdapterInvalid, RemoraError, Unsupported
from tests.buildhost.test_adapter_kinds import (
    EVERYTHING,
    PROMPT,
    TOLERANCE,
    some_tokens,
    worst,
)
from tests.buildhost.test_adapter_logits import reference
from tests.support.adapters import make_peft_adapter, peft_quiet
from tests.support.bank_feed import feed
from tests.support.checkpoints import make_checkpoint
from tests.support.lora_draws import Config, draw
from tests.support.portable import PortableModel

BIASED = {"attention_bias": True, "mlp_bias": True}
# Family, whether tied, further settings: biases everywhere; tied; experts, stacked and shared;
# fused modules; capped and scaled logits; layer norms with biases; norms behind the blocks.
FAMILIES: Mapping[str, tuple[Any, bool, dict[str, Any]]] = {
    "llama": ("llama", False, BIASED),
    "qwen2 tied": ("qwen2", True, {}),
    "qwen3_moe": ("qwen3_moe", False, {}),
    "qwen2_moe": ("qwen2_moe", False, {}),
    "mixtral": ("mixtral", False, {}),
    "phi3": ("phi3", False, {}),
    "gemma2 tied": ("gemma2", True, {}),
    "gemma3_text tied": ("gemma3_text", True, {}),
    "stablelm": ("stablelm", False, {}),
    "glm4": ("glm4", False, {}),
    "granite tied": ("granite", True, {}),
    "olmo2": ("olmo2", False, {}),
}
# Field of a config -> how the refusal reads that it may lead to.
CARRY_REFUSES = {
    "modules_to_save": r"modules_to_save = ",
    "layer_replication": r"layer_replication = ",
    "init_lora_weights": r"init_lora_weights = '(pissa|olora)",
    "alora_invocation_tokens": r"alora_invocation_tokens beside bias or trainable_token_indices",
    "target_modules": r"chooses or weighs experts",
    "bias": r"trained bias of a norm",
    "use_dora": r"lm_head has DoRA, and shares the trained tokens",
    "ensure_weight_tying": r"lm_head\.lora_A\.weight has rank \d+, the config says",
}
MERGE_REFUSES = {
    "layer_replication": r"layer_replication = ",
    "init_lora_weights": r"init_lora_weights = '(pissa|olora)",
    "alora_invocation_tokens": r"alora_invocation_tokens = ",
    "lora_bias": r"lora_bias: .* has no bias that",
    "modules_to_save": r"norm\.modules_to_save\.bias",  # PEFT's second copy of a saved norm's bias
    "use_dora": r"has DoRA and shares the trained tokens",
    "ensure_weight_tying": r"lm_head\.lora_A\.weight is .*: its rank is",
}


PEFT_REFUSES = (ValueError, TypeError, RuntimeError, IndexError, AttributeError)


@dataclass(frozen=True)
class World:
    """A base in its three forms."""

    checkpoint: Path
    bundle_dir: Path
    bundle: Bundle
    modules: tuple[str, ...]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    made: dict[str, World] = {}

    def world(name: str) -> World:
        if name not in made:
            made[name] = make_world(name, tmp_path_factory.mktemp("world"))
        return made[name]

    return world


def make_world(name: str, directory: Path) -> World:
    import transformers

    family, tied, settings = FAMILIES[name]
    checkpoint = make_checkpoint(directory / "ck", family, tied=tied, seed=3, **settings)
    stacked = family.endswith("_moe") or family == "mixtral"
    adapt = ("embed", "head", "experts") if stacked else ("embed", "head")
    bundle_dir = directory / "bundle"
    export_checkpoint(checkpoint, bundle_dir, replace(EVERYTHING, adapt=adapt))
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    modules = tuple(module for module, _ in model.named_modules() if module)
    return World(checkpoint, bundle_dir, load_bundle(bundle_dir), modules)


@pytest.mark.parametrize("name", ["llama", "qwen2 tied", "qwen3_moe"])
def test_some_configurations_answer_as_peft_or_are_refused_by_name(
    name: str, worlds: Callable[[str], World], tmp_path: Path
) -> None:
    counts = compare(worlds(name), range(12), tmp_path)
    assert counts["carried"] >= 3 and counts["merged"] >= 3, counts


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_many_configurations_answer_as_peft_or_are_refused_by_name(
    name: str, worlds: Callable[[str], World], tmp_path: Path
) -> None:
    counts = compare(worlds(name), range(1000, 1120), tmp_path)
    assert counts["carried"] >= 30 and counts["merged"] >= 30, counts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2 tied", "qwen3_moe"])
def test_two_of_them_merged_by_weights_change_what_each_changes(
    name: str, worlds: Callable[[str], World], tmp_path: Path
) -> None:
    """base + w (a - base) + v (b - base), tensor by tensor, the head a tied base lacks included."""
    world = worlds(name)
    alone = list(weighable(world, range(2000, 2040), tmp_path))
    assert len(alone) >= 6
    base = with_head(world.checkpoint)
    for (one, first), (other, second) in zip(alone[::2], alone[1::2], strict=False):
        both = merged_weights(world, [one, other], tmp_path / f"both {other.directory.name}")
        for tensor, before in base.items():
            wanted = first[tensor] + second[tensor] - before
            where = f"{one.directory.name}, {other.directory.name}: {tensor}"
            np.testing.assert_allclose(both[tensor], wanted, atol=2e-5, err_msg=where)


def weighable(
    world: World, seeds: range, directory: Path
) -> Iterator[tuple[Weighted, dict[str, np.ndarray]]]:
    """Adapters that can be merged by a weight, and what becomes of the base."""
    for seed in seeds:
        config = draw(random.Random(seed), world.modules)
        adapter = Weighted(directory / f"seed {seed}", 0.75 if seed % 2 else -1.5)
        try:
            with peft_quiet():
                make_peft_adapter(world.checkpoint, adapter.directory, seed=seed, **config)
            yield adapter, merged_weights(world, [adapter], directory / f"merged {seed}")
        except (*PEFT_REFUSES, Unsupported, AdapterInvalid):
            continue


def merged_weights(world: World, adapters: list[Weighted], out: Path) -> dict[str, np.ndarray]:
    merge_adapters(world.checkpoint, adapters, out)
    return with_head(out)


def with_head(checkpoint: Path) -> dict[str, np.ndarray]:
    tensors = load_file(checkpoint / "model.safetensors")
    return {"lm_head.weight": tensors["model.embed_tokens.weight"]} | tensors


def compare(world: World, seeds: range, directory: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    for seed in seeds:
        config = draw(random.Random(seed), world.modules)
        tokens = some_tokens(1)
        invocation = config.get("alora_invocation_tokens", [])
        tokens[0, : len(invocation)] = invocation  # then all of the prompt is behind it
        peft_dir = directory / f"peft{seed}"
        wanted = trained(world, config, seed, peft_dir, tokens)
        if wanted is None:
            counts["not trained"] += 1
            continue
        counts[carried(world, config, peft_dir, tokens, wanted, f"seed {seed}: {config}")] += 1
        counts[merged(world, config, peft_dir, tokens, wanted, f"seed {seed}: {config}")] += 1
    return counts


def trained(
    world: World, config: Config, seed: int, peft_dir: Path, tokens: np.ndarray
) -> np.ndarray | None:
    """PEFT's logits with the adapter as it loads it; None where it refuses the configuration. It
    sorts patterns when it saves them, and cannot load all that it saved."""
    try:
        with peft_quiet():
            make_peft_adapter(world.checkpoint, peft_dir, seed=seed, **config)
            return reference(world.checkpoint, tokens, peft_dir)
    except PEFT_REFUSES:
        return None


def carried(
    world: World,
    config: Config,
    peft_dir: Path,
    tokens: np.ndarray,
    wanted: np.ndarray,
    where: str,
) -> str:
    out = peft_dir / "sidecar"
    try:
        convert_adapter(peft_dir, out, base=world.bundle_dir)
    except RemoraError as e:
        check_refusal(e, config, CARRY_REFUSES, where)
        return "not carried"
    model = PortableModel(world.bundle_dir)
    model.adapter_feed = feed(world.bundle, [out], [[1.0]])
    assert worst(model.forced(tokens, PROMPT), wanted) <= TOLERANCE, where
    return "carried"


def merged(
    world: World,
    config: Config,
    peft_dir: Path,
    tokens: np.ndarray,
    wanted: np.ndarray,
    where: str,
) -> str:
    out = peft_dir / "merged"
    try:
        merge_adapters(world.checkpoint, [Weighted(peft_dir)], out)
    except RemoraError as e:
        check_refusal(e, config, MERGE_REFUSES, where)
        return "not merged"
    assert np.abs(plain_logits(out, tokens) - wanted).max() <= TOLERANCE, where
    return "merged"


def check_refusal(
    error: RemoraError, config: Config, reasons: Mapping[str, str], where: str
) -> None:
    """It is one that a drawn field leads to."""
    assert isinstance(error, Unsupported | AdapterInvalid), where
    told = [field for field, text in reasons.items() if re.search(text, str(error))]
    assert told and any(config.get(field) for field in told), f"{where}: {error}"


def plain_logits(checkpoint: Path, tokens: np.ndarray) -> np.ndarray:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        found: np.ndarray = model(torch.from_numpy(tokens)).logits.numpy()
    return found
