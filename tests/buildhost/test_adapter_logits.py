"""An exported graph with converted adapters answers as transformers + peft: logits within 1e-4 in
float32, for every kind of adapter, two adapters weighted, and different adapters in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from remora_build.adapters.convert import convert_adapter
from remora_build.cli import build_app
from tests.buildhost.test_adapter_algebra import ONE_PER_KIND
from tests.support.adapters import (
    Tensors,
    bank_feed,
    load_tensors,
    make_peft_adapter,
    peft_quiet,
    random_tensors,
)
from tests.support.portable import PortableModel

TOLERANCE = 1e-4
PROMPT = 6
A_KIND: dict[str, Any] = {"r": 4, "use_rslora": True, "rank_pattern": {"down_proj": 7, "q_proj": 1}}
B_KIND: dict[str, Any] = {"r": 3, "lora_alpha": 12, "alpha_pattern": {"gate_proj": 30}}
WEIGHTS = (0.75, 1.5)


def export(checkpoint: Path, out: Path, dtype: str = "float32") -> Path:
    arguments = ["export", checkpoint, out, "--dtype", dtype, "--max-context", 64]
    result = CliRunner().invoke(build_app(), [str(a) for a in arguments])
    if result.exception is not None:
        raise result.exception
    return out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.checkpoints import make_checkpoint

    directory = tmp_path_factory.mktemp("checkpoint")
    return make_checkpoint(directory, "qwen3", layers=3, hidden=32, head_dim=8)


@pytest.fixture(scope="module")
def base(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(checkpoint, tmp_path_factory.mktemp("bundle") / "base")


@pytest.fixture(scope="module")
def two_adapters(
    checkpoint: Path, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[tuple[Path, Path], tuple[Tensors, Tensors]]:
    """(PEFT directories, converted tensors) of A and B."""
    directory = tmp_path_factory.mktemp("adapters")
    peft_dirs = (
        make_peft_adapter(checkpoint, directory / "peft_a", seed=1, **A_KIND),
        make_peft_adapter(checkpoint, directory / "peft_b", seed=2, **B_KIND),
    )
    return peft_dirs, tuple(converted(d, base, directory) for d in peft_dirs)  # type: ignore


def converted(peft_dir: Path, base: Path, directory: Path) -> Tensors:
    out = directory / f"{peft_dir.name}.remora"
    convert_adapter(peft_dir, out, base=base)
    return load_tensors(out)


def some_tokens(rows: int, length: int, vocab: int = 320) -> np.ndarray:
    return np.random.default_rng(5).integers(0, vocab, (rows, length))


def reference(
    checkpoint: Path, tokens: np.ndarray, *adapters: Path, weights: Sequence[float] = (1.0,)
) -> np.ndarray:
    """Logits [rows, s, vocab] of transformers with the adapters in peft. Several are summed by
    their weights: peft's own delta of each, added to the base."""
    import torch

    model, names = _peft_model(checkpoint, adapters)
    if len(names) > 1:
        with torch.no_grad():
            for module in _lora_layers(model):
                for name, weight in zip(names, weights, strict=True):
                    module.base_layer.weight += weight * module.get_delta_weight(name)
        model = model.unload()
    return _logits(model, tokens)


def reference_cat(
    checkpoint: Path, tokens: np.ndarray, *adapters: Path, weights: Sequence[float]
) -> np.ndarray:
    """Several by peft's add_weighted_adapter, "cat". Not for adapters with use_rslora: peft keeps
    the first one's in the combination, whose scale is then alpha / sqrt(r)."""
    model, names = _peft_model(checkpoint, adapters)
    model.add_weighted_adapter(names, list(weights), "mix", combination_type="cat")
    model.set_adapter("mix")
    return _logits(model, tokens)


def _peft_model(checkpoint: Path, adapters: Sequence[Path]) -> tuple[Any, list[str]]:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    names = [f"adapter{i}" for i in range(len(adapters))]
    with peft_quiet():
        for i, (name, path) in enumerate(zip(names, adapters, strict=True)):
            if i == 0:
                model = peft.PeftModel.from_pretrained(model, path, adapter_name=name)
            else:
                model.load_adapter(path, adapter_name=name)
    return model, names


def _lora_layers(model: Any) -> list[Any]:
    import peft

    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


def _logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens)).logits.numpy()


def answers(
    base: Path, resident: Sequence[Tensors], weights: Sequence[Sequence[float]], tokens: np.ndarray
) -> np.ndarray:
    """Logits [rows, s - PROMPT + 1, vocab] of the graph: one prefill, then single steps."""
    model = PortableModel(base, rows=len(tokens))
    if resident:
        model.adapter_feed = bank_feed(model.bundle, resident, weights)
    return model.forced(tokens, PROMPT)


def assert_same(
    got: np.ndarray, reference_logits: np.ndarray, tolerance: float = TOLERANCE
) -> None:
    want = reference_logits[:, PROMPT - 1 :]
    assert np.abs(got - want).max() <= tolerance
    if tolerance == TOLERANCE:
        assert np.array_equal(got.argmax(-1), want.argmax(-1))


@pytest.mark.parametrize("kind", ONE_PER_KIND)
def test_each_kind_of_adapter_answers_as_peft(
    kind: str, checkpoint: Path, base: Path, tmp_path: Path
) -> None:
    peft_dir = make_peft_adapter(checkpoint, tmp_path / "peft", seed=3, **ONE_PER_KIND[kind])
    tokens = some_tokens(1, PROMPT + 4)

    got = answers(base, [converted(peft_dir, base, tmp_path)], [[1.0]], tokens)

    assert_same(got, reference(checkpoint, tokens, peft_dir))
    plain = reference(checkpoint, tokens)
    assert np.abs(got - plain[:, PROMPT - 1 :]).max() > 100 * TOLERANCE  # it does change something


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_family_answers_as_peft_over_prefill_and_32_steps(
    family: Any, tmp_path: Path
) -> None:
    from tests.support.checkpoints import make_checkpoint

    checkpoint = make_checkpoint(tmp_path / "checkpoint", family, tied=family == "qwen2")
    base = export(checkpoint, tmp_path / "base")
    peft_dir = make_peft_adapter(checkpoint, tmp_path / "peft", seed=4, **A_KIND)
    tokens = some_tokens(1, PROMPT + 32)

    got = answers(base, [converted(peft_dir, base, tmp_path)], [[1.0]], tokens)

    assert_same(got, reference(checkpoint, tokens, peft_dir))


def test_two_weighted_adapters_answer_as_their_sum(
    checkpoint: Path, base: Path, two_adapters: Any
) -> None:
    peft_dirs, resident = two_adapters
    tokens = some_tokens(1, PROMPT + 4)

    got = answers(base, resident, [WEIGHTS], tokens)

    assert_same(got, reference(checkpoint, tokens, *peft_dirs, weights=WEIGHTS))


def test_two_weighted_adapters_answer_as_pefts_own_combination(
    checkpoint: Path, base: Path, tmp_path: Path
) -> None:
    first = make_peft_adapter(checkpoint, tmp_path / "first", seed=7, r=4, lora_alpha=6)
    second = make_peft_adapter(checkpoint, tmp_path / "second", seed=8, r=2)
    resident = [converted(d, base, tmp_path) for d in (first, second)]
    tokens = some_tokens(1, PROMPT + 4)

    got = answers(base, resident, [WEIGHTS], tokens)

    assert_same(got, reference_cat(checkpoint, tokens, first, second, weights=WEIGHTS))


def test_rows_of_one_batch_each_answer_with_their_own_adapters(
    checkpoint: Path, base: Path, two_adapters: Any
) -> None:
    """Row 0 without, 1 with A, 2 with B, 3 with both, weighted."""
    peft_dirs, resident = two_adapters
    tokens = some_tokens(4, PROMPT + 4)

    got = answers(base, resident, [(0, 0), (1, 0), (0, 1), WEIGHTS], tokens)

    per_row = [(), peft_dirs[:1], peft_dirs[1:], peft_dirs]
    for row, paths in enumerate(per_row):
        want = reference(checkpoint, tokens[row : row + 1], *paths, weights=WEIGHTS)
        assert_same(got[row : row + 1], want)


def test_a_row_does_not_depend_on_what_else_is_resident(base: Path, two_adapters: Any) -> None:
    _, (a, b) = two_adapters
    tokens = some_tokens(2, PROMPT + 4)
    decoder = PortableModel(base).bundle.decoder
    loud = random_tensors(decoder, seed=9, r=5, scale=1e4)

    alone = answers(base, [a], [(1,), (1,)], tokens)
    crowded = answers(base, [loud, a, b], [(0, 1, 0), (1, 0, 1)], tokens)

    np.testing.assert_allclose(crowded[0], alone[0], atol=1e-5)
    assert np.abs(crowded[1] - alone[1]).max() > 1


def test_a_resident_adapter_that_nobody_uses_changes_nothing(
    checkpoint: Path, base: Path, two_adapters: Any
) -> None:
    tokens = some_tokens(1, PROMPT + 4)
    got = answers(base, two_adapters[1], [(0, 0)], tokens)
    assert_same(got, reference(checkpoint, tokens))


def test_a_float16_adapter_on_a_float16_bundle_stays_close(
    checkpoint: Path, tmp_path: Path
) -> None:
    base = export(checkpoint, tmp_path / "base", dtype="float16")
    peft_dir = make_peft_adapter(checkpoint, tmp_path / "peft", seed=6, **A_KIND)
    tokens = some_tokens(1, PROMPT + 4)
    got = answers(base, [converted(peft_dir, base, tmp_path)], [[1.0]], tokens)
    assert_same(got, reference(checkpoint, tokens, peft_dir), tolerance=2e-2)
