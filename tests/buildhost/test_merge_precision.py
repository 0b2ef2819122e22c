"""Half precision: computed in float32, rounded once. PEFT on a model loaded in that precision may
round the product too before it adds it, so it is within one unit in the last place of the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from remora_contract.errors import AdapterInvalid
from tests.buildhost.merging import (
    adapter,
    checkpoint,
    load,
    merge,
    merged_by_peft,
    state,
    stored,
)

UNIT = {"bfloat16": 2**-8, "float16": 2**-11}  # half a unit in the last place, relative
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"bias": "all"},
    "dora": {"use_dora": True},
    "whole": {"modules_to_save": ["lm_head", "norm"], "target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.fixture(scope="module", params=UNIT)
def half(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp(request.param) / "base"
    return request.param, checkpoint(directory, "qwen2", dtype=request.param)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_weight_is_the_rounded_exact_one(kind: str, half: Any, tmp_path: Path) -> None:
    dtype, base = half
    trained = adapter(base, tmp_path / "peft", **CONFIGS[kind])

    merge(base, tmp_path / "out", trained)

    exact = merged_by_peft(base, trained, "float32")
    got = state(load(tmp_path / "out", dtype))
    for name, value in got.items():
        assert value.dtype == getattr(torch, dtype)
        error = (value.float() - exact[name]).abs()
        assert (error <= exact[name].abs() * UNIT[dtype] * 1.001 + 1e-7).all(), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_peft_in_that_precision_is_within_a_unit(kind: str, half: Any, tmp_path: Path) -> None:
    dtype, base = half
    trained = adapter(base, tmp_path / "peft", **CONFIGS[kind])

    merge(base, tmp_path / "out", trained)

    start, want = state(load(base, dtype)), merged_by_peft(base, trained, dtype)
    for name, value in state(load(tmp_path / "out", dtype)).items():
        summands = want[name].float().abs() + start[name].float().abs()
        error = (value.float() - want[name].float()).abs()
        assert (error <= summands * UNIT[dtype] * 2 + 1e-6).all(), name


def test_an_unchanged_tensor_keeps_its_bytes(half: Any, tmp_path: Path) -> None:
    _, base = half
    merge(base, tmp_path / "out", adapter(base, tmp_path / "peft", target_modules=["q_proj"]))
    before, after = stored(base), stored(tmp_path / "out")
    assert set(before) == set(after)
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}


def test_what_leaves_float16_is_refused_by_name(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", dtype="float16")
    trained = adapter(base, tmp_path / "peft", target_modules=["q_proj"], lora_alpha=4_000_000)

    with pytest.raises(AdapterInvalid, match=r"q_proj\.weight merged is not finite in F16"):
        merge(base, tmp_path / "out", trained)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused_by_its_tensor(
    value: float, tmp_path: Path
) -> None:
    base = checkpoint(tmp_path / "base")
    trained = adapter(base, tmp_path / "peft")
    weights = load_file(trained / "adapter_model.safetensors")
    name = next(n for n in weights if "layers.1" in n)
    weights[name][0, 0] = value
    save_file(weights, trained / "adapter_model.safetensors")

    with pytest.raises(AdapterInvalid, match=f"{name} holds NaN or infinity"):
        merge(base, tmp_path / "out", trained)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "peft"]
