"""Phi-3 and Phi-4-mini around their ropes' original context, against transformers: which factors
turn a sequence is decided by all its tokens, wherever a prompt is cut; one that grows past the
border is read again, as transformers' generate does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from remora_agent.engine.cache import EngineCache
from remora_agent.engine.opening import EngineOptions, open_engine
from remora_agent.engine.probe import FLOAT32_TOLERANCE, load_golden, prove
from remora_agent.engine.protocol import Engine, RowStep
from remora_agent.runtime.model_runtime import ModelRuntime
from remora_agent.runtime.options import RuntimeOptions
from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_contract.bundle import BUNDLE_JSON, load_bundle
from remora_contract.errors import Incompatible
from tests.buildhost import family_forms
from tests.buildhost.reference import load_reference, reference_logits, reference_states
from tests.support.checkpoints import make_checkpoint
from tests.support.runtime import Listener, request
from tests.support.trt_engines import Bench, build

BORDER, CONTEXT, ANSWER = 64, 160, 64
OPTIONS = EngineOptions(rows=3, threads=1, accuracy_level=1)
ANY = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
around = st.integers(BORDER - 3, BORDER + 3)
# form, dialect, backend
KINDS = {
    "phi3": ("phi3", "native", "onnxruntime"),
    "phi3 legacy": ("phi3", "legacy", "onnxruntime"),
    "phi4-mini": ("phi3-tied-three-layers", "native", "onnxruntime"),
    "phi3 tensorrt": ("phi3", "native", "tensorrt"),
    "phi3 tensorrt legacy": ("phi3", "legacy", "tensorrt"),
}


class Made:
    """A checkpoint, its bundle and an engine of it."""

    def __init__(self, root: Path, form: str, dialect: str, backend: str, **options) -> None:
        family, config = family_forms.FORMS[form]
        self.checkpoint = make_checkpoint(root / "checkpoint", family, seed=1, **config)
        self.bundle = root / "bundle"
        wanted = {"dtype": "float32", "max_context": CONTEXT, "max_bank_rank": 8}
        given_options = ExportOptions(**wanted | {"dialect": dialect} | options)
        export_checkpoint(self.checkpoint, self.bundle, given_options)
        self.reference = load_reference(self.checkpoint)
        self._root, self._backend = root, backend

    def open(self) -> Engine:
        if self._backend == "tensorrt":
            entry = build(self.bundle, self._root / "engine", rows=3, tokens=7)
            return Bench(self.bundle, entry).open(rows=3)
        return open_engine(self.bundle, EngineCache(self._root / "engines", 1 << 40), OPTIONS)


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory) -> Made:
    return Made(tmp_path_factory.mktemp("longrope"), *KINDS[request.param])


@pytest.fixture(scope="module")
def engine(made: Made) -> Iterator[Engine]:
    engine = made.open()
    yield engine
    engine.close()


def tokens_of(count: int) -> np.ndarray:
    return np.random.default_rng(6).integers(0, 320, count)


def pieces(count: int, size: int) -> list[tuple[int, int]]:
    return [(at, min(at + size, count)) for at in range(0, count, size)]


@given(around, st.integers(1, BORDER + 3), st.sampled_from(["prefill", "score", "embed"]))
@ANY
def test_chunks_of_any_size_are_turned_as_the_whole_prompt(made, engine, count, size, how):
    tokens = tokens_of(count)
    found = [getattr(engine, how)(1, tokens[a:b], a, (), count) for a, b in pieces(count, size)]
    logits = reference_logits(made.reference, tokens[None])[0]
    if how == "prefill":
        assert np.abs(found[-1] - logits[-1]).max() <= 1e-4
    elif how == "score":
        assert np.abs(np.concatenate(found) - logits).max() <= 1e-4
    else:
        states = reference_states(made.reference, tokens[None])[0]
        assert np.abs(np.concatenate(found) - states).max() <= 1e-4 * max(1, np.abs(states).max())


def test_rows_of_both_kinds_decode_in_one_step(made, engine):
    tokens, ends = tokens_of(BORDER + 5), (BORDER - 1, BORDER + 4)
    for row, end in enumerate(ends):
        engine.prefill(row, tokens[:end], 0)
    have = engine.decode([RowStep(row, int(tokens[end]), end) for row, end in enumerate(ends)])
    for logits, end in zip(have, ends, strict=True):
        want = reference_logits(made.reference, tokens[None, : end + 1])[0, -1]
        assert np.abs(logits - want).max() <= 1e-4


@given(st.lists(around, min_size=1, max_size=3), st.integers(1, BORDER + 3))
@settings(ANY, max_examples=4)
def test_a_served_answer_is_what_transformers_generates(made, counts, size):
    options = RuntimeOptions(prefill_chunk=size, prefix_bytes=1 << 24)
    runtime = ModelRuntime.open(made.open(), load_bundle(made.bundle), made.bundle, options=options)
    heard = []
    for i, count in enumerate(counts):
        listener = Listener()
        runtime.submit(request(str(i), tuple(tokens_of(count).tolist()), ANSWER), listener)
        heard.append(listener)
    answers = [h.wait(60).tokens for h in heard]
    runtime.close()
    for count, answer in zip(counts, answers, strict=True):
        assert answer == generated(made, count)


def generated(made: Made, count: int) -> tuple[int, ...]:
    said = made.reference.generate(
        torch.from_numpy(tokens_of(count)[None]),
        attention_mask=torch.ones((1, count), dtype=torch.long),
        max_new_tokens=ANSWER,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tuple(said[0, count:].tolist())


def test_golden_prompts_across_the_border_prove_an_engine(made, tmp_path):
    """Recorded in one pass over the whole, and asked token by token over the border."""
    prompts = tmp_path / "golden.jsonl"
    lines = [json.dumps({"tokens": tokens_of(BORDER + n).tolist()}) for n in (-1, 0, 1, 9)]
    prompts.write_text("\n".join(lines))
    dialect = load_bundle(made.bundle).graph.dialect
    options = ExportOptions(
        dtype="float32", max_context=CONTEXT, dialect=dialect, golden_file=prompts
    )
    export_checkpoint(made.checkpoint, tmp_path / "bundle", options)
    engine = made.open()
    assert prove(engine, load_golden(tmp_path / "bundle"), FLOAT32_TOLERANCE) == 4 * 16
    engine.close()


def test_prompts_in_int8_are_turned_as_the_whole_prompt(tmp_path):
    made = Made(tmp_path, "phi3", "native", "onnxruntime", int4_block=32)
    cache = EngineCache(tmp_path / "engines", 1 << 40)
    tokens, found = tokens_of(BORDER + 8), {}
    for prefill in ("plain", "int8"):
        options = EngineOptions(rows=2, threads=1, prefill=prefill)
        engine = open_engine(made.bundle, cache, options)
        engine.prefill(0, tokens[:40], 0, (), len(tokens))
        found[prefill] = engine.prefill(0, tokens[40:], 40)
        engine.prefill(1, tokens[:40], 0)
        found[f"{prefill}, cut wrongly"] = engine.prefill(1, tokens[40:], 40)
        engine.close()
    spread = found["plain"].std()
    assert np.abs(found["plain"] - found["int8"]).std() < 0.1 * spread
    assert np.abs(found["plain"] - found["int8, cut wrongly"]).std() > 0.2 * spread


def test_a_bundle_from_before_there_was_a_length_serves_its_original_context_only(tmp_path):
    made = Made(tmp_path, "phi3", "native", "onnxruntime")
    document = json.loads((made.bundle / BUNDLE_JSON).read_text())
    assert document["graph"].pop("sequence_length") is True
    (made.bundle / BUNDLE_JSON).write_text(json.dumps(document))
    cache = EngineCache(tmp_path / "engines", 1 << 40)
    with pytest.raises(Incompatible, match="or a context of at most 64"):
        open_engine(made.bundle, cache, OPTIONS)
    short = EngineOptions(rows=1, threads=1, context=BORDER)
    engine = open_engine(made.bundle, cache, short)
    assert engine.limits.switch is None
    engine.close()
