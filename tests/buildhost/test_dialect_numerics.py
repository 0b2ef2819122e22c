"""The legacy graph answers what transformers and the native graph answer, family by family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_build.families import FAMILIES
from remora_contract.bundle import GOLDEN_JSON
from remora_contract.golden import Golden
from remora_contract.strict import loads
from tests.buildhost.test_export_numerics import compared
from tests.support.checkpoints import make_checkpoint
from tests.support.portable import PortableModel

CONTEXT = 128
Exported = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Exported:
    """(checkpoint, bundle), the checkpoint of a family made once."""
    root = tmp_path_factory.mktemp("dialects")

    def export(family: str, **options) -> tuple[Path, Path]:
        checkpoint = root / family
        if not checkpoint.exists():
            make_checkpoint(checkpoint, family, seed=1)
        bundle = root / f"{family}-bundle"
        chosen = {"dialect": "legacy", "golden": False, **options}
        settings = ExportOptions(max_context=CONTEXT, max_bank_rank=8, **chosen)
        export_checkpoint(checkpoint, bundle, settings, replace=True)
        return checkpoint, bundle

    return export


@pytest.mark.parametrize("family", FAMILIES)
def test_the_float32_legacy_graph_equals_transformers(exported, family):
    have, want = compared(*exported(family, dtype="float32"))
    assert np.abs(have - want).max() <= 1e-4
    assert (have.argmax(-1) == want.argmax(-1)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_float16_legacy_graph_stays_close_to_transformers(exported, family):
    have, want = compared(*exported(family, dtype="float16"))
    assert np.abs(have - want).max() <= 2e-2


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_int4_legacy_graph_equals_the_native_one(exported, family):
    """Which test_export_numerics compares with transformers."""
    tokens = np.random.default_rng(2).integers(0, 320, (2, 48))
    answers = []
    for dialect in ("native", "legacy"):
        _, bundle = exported(family, dialect=dialect, dtype="float32", int4_block=32)
        answers.append(PortableModel(bundle, rows=2).forced(tokens, 40))
    assert np.abs(answers[0] - answers[1]).max() <= 1e-4


ADAPT_ALL = {"adapt": ("embed", "head", "experts"), "dora": True, "adapter_bias": True}
BANKS = {
    "qwen3": {**ADAPT_ALL, "adapt": ("embed", "head")},
    "gemma2": {},
    "qwen2_moe": ADAPT_ALL,
    "qwen3_moe": {"adapt": ("experts",), "int4_block": 32},
}


@pytest.mark.parametrize("family", BANKS)
def test_the_dialects_agree_with_every_adapter_input_filled(exported, family):
    rng, answers = np.random.default_rng(3), []
    tokens = rng.integers(0, 320, (2, 48))
    filled: dict[str, np.ndarray] = {}
    for dialect in ("native", "legacy"):
        _, bundle = exported(family, dialect=dialect, dtype="float32", **BANKS[family])
        model = PortableModel(bundle, rows=2)
        for name, empty in model.adapter_feed.items():
            shape = [n or 4 for n in empty.shape]
            filled.setdefault(name, rng.normal(0.0, 0.2, shape).astype(empty.dtype))
        assert set(filled) == set(model.adapter_feed)
        base = PortableModel(bundle, rows=2).forced(tokens, 40)
        model.adapter_feed = filled
        answers.append(model.forced(tokens, 40))
        assert np.abs(answers[-1] - base).max() > 0.1
    assert np.abs(answers[0] - answers[1]).max() <= 1e-4


@pytest.mark.parametrize("block", [None, 32], ids=["plain", "int4"])
def test_golden_prompts_are_recorded_from_the_legacy_graph(exported, block):
    """The cache is shrunk while recording: no node may know its capacity."""
    _, bundle = exported("qwen3", dtype="float32", int4_block=block, golden=True)
    golden = loads(Golden, (bundle / GOLDEN_JSON).read_bytes(), GOLDEN_JSON)
    for prompt in golden.prompts:
        count = len(prompt.expected)
        model = PortableModel(bundle)
        logits = model.forced(np.array([prompt.tokens]), len(prompt.tokens) - count + 1)[0]
        assert np.abs(logits.max(-1) - prompt.logit).max() <= 1e-4
        assert logits.argmax(-1).tolist() == list(prompt.expected)
