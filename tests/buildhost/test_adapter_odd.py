"""Adapters that PEFT of today does not write: older ones, mended ones, damaged and hostile ones.
Both commands take what is the same adapter still, and name what is wrong with the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from remora_build.adapters.convert import convert_adapter
from remora_build.merge.adapter import Weighted
from remora_build.merge.merger import merge_adapters
from remora_contract.errors import RemoraError
from tests.buildhost.documents import decoder_spec, write_bundle
from tests.support.adapters import make_peft_adapter
from tests.support.checkpoints import make_checkpoint

Tensors = dict[str, torch.Tensor]
Mend = Callable[[dict[str, Any], Tensors], tuple[Any, Tensors]]
FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
WEIGHTS = "adapter_model.safetensors"
OLD_FIELDS = ("peft_type", "r", "lora_alpha", "target_modules")


def config(**changes: Any) -> Mend:
    return lambda c, t: (c | changes, t)


def named(spell: Callable[[str], str]) -> Mend:
    return lambda c, t: (c, {spell(name): value for name, value in t.items()})


def cast(dtype: torch.dtype) -> Mend:
    return lambda c, t: (c, {name: value.to(dtype) for name, value in t.items()})


def first(change: Callable[[torch.Tensor], torch.Tensor]) -> Mend:
    return lambda c, t: (c, t | {FIRST: change(t[FIRST].clone())})


def no_rank(c: dict[str, Any], t: Tensors) -> tuple[Any, Tensors]:
    cut = {n: (v[:0] if "lora_A" in n else v[:, :0]) for n, v in t.items()}
    return c | {"r": 0}, cut


SAME: dict[str, Mend] = {
    "fields of the first versions": lambda c, t: ({n: c[n] for n in OLD_FIELDS}, t),
    "fields that are gone": config(enable_lora=None, merge_weights=False),
    "a target twice": config(target_modules=["q_proj", "down_proj", "q_proj"]),
}
TAKEN: dict[str, Mend] = {
    "bfloat16": cast(torch.bfloat16),
    "an alpha of nothing": config(lora_alpha=0),
    "a negative alpha": config(lora_alpha=-3),
}
REFUSED: dict[str, tuple[Mend, str]] = {
    "names with the adapter's": (
        named(lambda n: n.replace(".weight", ".default.weight")), r"lora_A\.default\.weight",
    ),
    "names of a compiled base": (
        named(lambda n: n.replace(".model.model.", ".model._orig_mod.model.")),
        "_orig_mod.*compile after get_peft_model",
    ),
    "tokens without rows": (
        config(trainable_token_indices=[5]), r"trainable_token.*trainable_tokens_delta",
    ),
    "tokens that are none, without rows": (
        config(trainable_token_indices={"lm_head": [1 << 40]}), "trainable_token",
    ),
    "names of the bare model": (named(lambda n: n.removeprefix("base_model.model.")), "PEFT"),
    "names out of a path": (
        lambda c, t: (c, t | {"../../etc/passwd": torch.ones(1)}), r"tensor \.\./\.\./etc/passwd",
    ),
    "a name without end": (
        lambda c, t: (c, t | {"base_model.model." + "x" * 50_000: torch.ones(1)}), "tensor base_m",
    ),
    "no tensors": (lambda c, t: (c, {}), "tensors"),
    "float8": (cast(torch.float8_e4m3fn), "'F8_E4M3'.*save it in one of them"),
    "float64": (cast(torch.float64), "'F64'.*save it in one of them"),
    "whole numbers": (cast(torch.int8), "'I8'"),
    "no rank": (no_rank, "r must be a whole number from 1"),
    "a rank beyond memory": (config(r=1 << 40), "r must be a whole number from 1"),
    "a rank that the tensors lack": (config(r=1 << 20), "rank"),
    "a rank for nothing": (config(rank_pattern={"q_proj": 0}), "rank_pattern must be"),
    "three dimensions": (first(lambda v: v[None]), r"is \[1, 4, 96\]"),
    "no dimension": (first(lambda v: torch.tensor(1.0)), r"is \[\]"),
    "not a number": (first(lambda v: v.index_fill(0, torch.tensor([1]), np.nan)), "holds NaN"),
    "infinity": (first(lambda v: v.index_fill(0, torch.tensor([3]), -np.inf)), "holds NaN"),
    "factors the other way round": (
        named(lambda n: n.translate({ord("A"): "B", ord("B"): "A"})), "down_proj.lora_A",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(checkpoint, a bundle's document, an adapter)"""
    directory = tmp_path_factory.mktemp("odd")
    checkpoint = make_checkpoint(directory / "checkpoint", "qwen3", seed=3)
    write_bundle(directory / "bundle", decoder_spec(checkpoint))
    adapter = make_peft_adapter(
        checkpoint, directory / "peft", seed=1, r=4, target_modules=["q_proj", "down_proj"]
    )
    return checkpoint, directory / "bundle", adapter


def mended(adapter: Path, mend: Mend, directory: Path) -> Path:
    directory.mkdir()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings, tensors = mend(settings, load_file(adapter / WEIGHTS))
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    save_file({n: v.contiguous() for n, v in tensors.items()}, directory / WEIGHTS)
    return directory


@pytest.mark.parametrize("case", [*SAME, *TAKEN])
def test_what_is_an_adapter_still_is_taken(case: str, bases: Any, tmp_path: Path) -> None:
    checkpoint, bundle, adapter = bases
    odd = mended(adapter, (SAME | TAKEN)[case], tmp_path / "odd")

    convert_adapter(odd, tmp_path / "sidecar", base=bundle)
    merge_adapters(checkpoint, [Weighted(odd)], tmp_path / "merged")

    convert_adapter(adapter, tmp_path / "plain", base=bundle)
    merge_adapters(checkpoint, [Weighted(adapter)], tmp_path / "plainly")
    for one, other in (
        ("sidecar/adapter.safetensors", "plain/adapter.safetensors"),
        ("merged/model.safetensors", "plainly/model.safetensors"),
    ):
        same = (tmp_path / one).read_bytes() == (tmp_path / other).read_bytes()
        assert same == (case in SAME), one


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_model.bin", "adapter_config.json"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(name: str, bases: Any, tmp_path: Path) -> None:
    checkpoint, bundle, adapter = bases
    odd = mended(adapter, config(), tmp_path / "odd")
    (odd / WEIGHTS).unlink()
    (odd / name).unlink(missing_ok=True)
    os.mkfifo(odd / name)

    for run in (
        lambda: convert_adapter(odd, tmp_path / "sidecar", base=bundle),
        lambda: merge_adapters(checkpoint, [Weighted(odd)], tmp_path / "merged"),
    ):
        with pytest.raises(RemoraError, match=f"{name} is no file"):
            run()


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_none_is_refused_by_its_fault(case: str, bases: Any, tmp_path: Path) -> None:
    checkpoint, bundle, adapter = bases
    mend, fault = REFUSED[case]
    odd = mended(adapter, mend, tmp_path / "odd")

    with pytest.raises(RemoraError, match=fault):
        convert_adapter(odd, tmp_path / "sidecar", base=bundle)
    with pytest.raises(RemoraError, match=fault):
        merge_adapters(checkpoint, [Weighted(odd)], tmp_path / "merged")
    assert not (tmp_path / "sidecar").exists() and not (tmp_path / "merged").exists()
