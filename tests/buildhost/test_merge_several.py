"""Several adapters and weights: PEFT's combination type "cat", or a refusal with its cause."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from remora_contract.errors import RequestInvalid, Unsupported
from tests.buildhost.merging import (
    adapter,
    assert_same,
    checkpoint,
    combined_by_peft,
    load,
    merge,
    merged_by_peft,
    state,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("base") / "base", "qwen2")


def test_a_weighted_sum_is_pefts_cat(base: Path, tmp_path: Path) -> None:
    """Different ranks, patterns, modules and scalings; a negative weight. (The first must not be
    rank-stabilised: PEFT takes its config over and scales the sum once more.)"""
    several = ["q_proj", "o_proj", "up_proj"]
    adapters = [
        adapter(base, tmp_path / "a", seed=1, rank_pattern={"q_proj": 2}),
        adapter(base, tmp_path / "b", seed=2, r=3, use_rslora=True, target_modules=several),
        adapter(base, tmp_path / "c", seed=3, r=1, target_modules=["lm_head", "embed_tokens"]),
    ]
    weights = [0.7, -0.4, 1.5]

    merge(base, tmp_path / "out", *adapters, weights=weights)

    assert_same(state(load(tmp_path / "out")), combined_by_peft(base, adapters, weights), 2e-6)


def test_a_weight_scales_a_single_adapter(base: Path, tmp_path: Path) -> None:
    trained = adapter(base, tmp_path / "a")
    merge(base, tmp_path / "out", trained, weights=[0.25])
    start, whole = state(load(base)), merged_by_peft(base, trained)
    part = {name: start[name] + 0.25 * (whole[name] - start[name]) for name in start}
    assert_same(state(load(tmp_path / "out")), part)


def test_without_weights_every_adapter_counts_once(base: Path, tmp_path: Path) -> None:
    adapters = [adapter(base, tmp_path / str(i), seed=i) for i in (1, 2)]
    merge(base, tmp_path / "out", *adapters)
    assert_same(state(load(tmp_path / "out")), combined_by_peft(base, adapters, [1, 1]))


def test_biases_on_b_add_up_scaled(base: Path, tmp_path: Path) -> None:
    config: dict[str, Any] = {"target_modules": ["q_proj"], "lora_bias": True}
    one = adapter(base, tmp_path / "a", seed=1, **config)
    other = adapter(base, tmp_path / "b", seed=2, use_rslora=True, **config)

    merge(base, tmp_path / "out", one, other, weights=[0.5, 2])

    start, a, b = state(load(base)), merged_by_peft(base, one), merged_by_peft(base, other)
    want = {n: start[n] + 0.5 * (a[n] - start[n]) + 2 * (b[n] - start[n]) for n in start}
    assert_same(state(load(tmp_path / "out")), want, 2e-6)


def test_stacked_experts_of_two_adapters_add_up(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", "mixtral")
    config: dict[str, Any] = {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    one = adapter(base, tmp_path / "a", seed=1, **config)
    other = adapter(base, tmp_path / "b", seed=2, r=2, **config)

    merge(base, tmp_path / "out", one, other, weights=[0.5, 2])

    start, a, b = state(load(base)), merged_by_peft(base, one), merged_by_peft(base, other)
    want = {n: start[n] + 0.5 * (a[n] - start[n]) + 2 * (b[n] - start[n]) for n in start}
    assert_same(state(load(tmp_path / "out")), want, 5e-6)


def test_copies_of_the_frozen_embedding_are_no_dispute(base: Path, tmp_path: Path) -> None:
    """PEFT saves them beside every adapter of an embedding."""
    adapters = [
        adapter(base, tmp_path / str(i), seed=i, target_modules=["embed_tokens"]) for i in (1, 2)
    ]
    merge(base, tmp_path / "out", *adapters)
    assert_same(state(load(tmp_path / "out")), combined_by_peft(base, adapters, [1, 1]))


def test_one_adapter_may_bring_a_whole_module(base: Path, tmp_path: Path) -> None:
    brings = adapter(base, tmp_path / "a", seed=1, modules_to_save=["model.norm"])
    other = adapter(base, tmp_path / "b", seed=2)
    merge(base, tmp_path / "out", brings, other, weights=[1, 0.5])
    want = merged_by_peft(base, brings)["model.norm.weight"]
    assert torch.equal(state(load(tmp_path / "out"))["model.norm.weight"], want)


DISPUTES: dict[str, tuple[dict[str, Any], dict[str, Any], list[float], str]] = {
    "dora beside another": ({"use_dora": True}, {}, [1, 1], "use_dora.*by itself"),
    "weighted dora": ({"use_dora": True}, {}, [0.5], r"--weights 0\.5.*DoRA.*weight 1"),
    "weighted biases": ({"bias": "all"}, {}, [0.5], r"--weights 0\.5.*bias.*as a whole"),
    "weighted module": (
        {"modules_to_save": ["norm"]},
        {},
        [0.5],
        r"--weights 0\.5.*norm.*as a whole",
    ),
    "weighted tokens": (
        {"trainable_token_indices": [1]},
        {},
        [2],
        r"--weights 2.*embed_tokens\.weight is trained as a whole",
    ),
    "one module twice": (
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["lm_head"]},
        [1, 1],
        r"lm_head\.weight is trained as a whole by one adapter and changed by another",
    ),
    "a whole module adapted": (
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["lm_head"]},
        [1, 1],
        r"lm_head\.weight is trained as a whole",
    ),
    "one token twice": (
        {"trainable_token_indices": [1, 2]},
        {"trainable_token_indices": [2, 3]},
        [1, 1],
        r"embed_tokens\.weight: two adapters train the same token",
    ),
}


@pytest.mark.parametrize("case", DISPUTES)
def test_what_has_no_sum_is_refused(case: str, base: Path, tmp_path: Path) -> None:
    first, second, weights, words = DISPUTES[case]
    adapters = [adapter(base, tmp_path / "a", seed=1, **first)]
    if len(weights) == 2:
        adapters.append(adapter(base, tmp_path / "b", seed=2, **second))

    with pytest.raises(Unsupported, match=words):
        merge(base, tmp_path / "out", *adapters, weights=weights)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e7])
def test_a_weight_that_is_no_factor_is_refused(weight: float, base: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestInvalid, match="--weights"):
        merge(base, tmp_path / "out", adapter(base, tmp_path / "a"), weights=[weight])
