"""Adapters come and go; what rows get is what the portable graph's bank gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remora_agent.bank.weights import AdapterWeights, Vectors
from remora_agent.engine.cache import CacheEntry
from remora_agent.engine.protocol import MixEntry, RowStep
from remora_agent.engine.trt import bank
from remora_agent.engine.trt.columns import Columns, bucket, runs
from remora_contract.errors import AdapterInvalid
from remora_contract.targets import AdapterTarget
from tests.agent.engine.portable import QWEN2, Reference, Weighted, random_adapter
from tests.support.trt_engines import Bench

PROMPT = [3, 4, 5]
KINDS = (
    random_adapter(QWEN2, 1, rank=3),
    random_adapter(QWEN2, 2, rank=9, projections=("q", "v", "down")),
    random_adapter(QWEN2, 3, rank=5, projections=("o", "up"), ranks={"o": 1}),
    random_adapter(QWEN2, 4, rank=17, projections=("k", "gate")),
)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=10))
def test_any_order_of_adding_removing_and_decoding_answers_as_the_bank_alone(
    trt_bundle: Path, trt_entry: CacheEntry, reference: Reference, turns: list[tuple[int, int]]
):
    """Each turn adds or removes a kind; then all rows decode, each with a mix of what is there."""
    gpu = Bench(trt_bundle, trt_entry)
    engine = gpu.open()
    resident: dict[int, int] = {}
    for kind, shift in turns:
        if kind in resident:
            engine.remove_adapter(resident.pop(kind))
        else:
            resident[kind] = engine.add_adapter(KINDS[kind])
        steps, weighted = [], []
        for row in range(4):
            kinds = [k for k in sorted(resident) if (k + row + shift) % 3]
            mix = tuple(MixEntry(resident[k], 0.5 + k) for k in kinds)
            engine.prefill(row, np.array(PROMPT, np.int64), 0, mix)
            steps.append(RowStep(row, 9, 3, mix))
            weighted.append(tuple(Weighted(KINDS[k], 0.5 + k) for k in kinds))
        for logits, mine in zip(engine.decode(steps), weighted, strict=True):
            assert np.abs(logits - reference.logits([*PROMPT, 9], mine)).max() < 5e-5
    engine.close()
    assert gpu.cuda.live == []


def test_factors_larger_than_the_staging_memory_arrive_whole(
    gpu: Bench, reference: Reference, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bank, "STAGED_BYTES", 1)
    engine = gpu.open()
    a = random_adapter(QWEN2, 5, rank=48)
    handle = engine.add_adapter(a)
    logits = engine.prefill(0, np.array(PROMPT, np.int64), 0, (MixEntry(handle, 1.0),))
    assert np.abs(logits - reference.logits(PROMPT, (Weighted(a),))).max() < 5e-5
    engine.close()


def test_preparing_ahead_changes_nothing_but_the_dtype(half_gpu: Bench):
    engine = half_gpu.open()
    a = random_adapter(QWEN2, 6)
    ready = engine.prepare(a)
    assert {x.dtype for pair in ready.tensors.values() for x in pair} == {np.dtype(np.float16)}
    assert ready.bytes <= a.bank_bytes
    mix = (MixEntry(engine.add_adapter(ready), 1.0),)
    first = engine.prefill(0, np.array(PROMPT, np.int64), 0, mix)
    mix = (MixEntry(engine.add_adapter(a), 1.0),)
    assert np.array_equal(engine.prefill(0, np.array(PROMPT, np.int64), 0, mix), first)
    engine.close()


def test_a_float16_engine_answers_as_the_float16_graph(half_gpu: Bench):
    reference = Reference(half_gpu.bundle_dir)
    engine = half_gpu.open()
    a = random_adapter(QWEN2, 7)
    mix = (MixEntry(engine.add_adapter(a), 1.0),)
    engine.prefill(1, np.array(PROMPT, np.int64), 0, mix)
    logits = engine.decode([RowStep(1, 9, 3, mix)])[0]
    assert np.abs(logits - reference.logits([*PROMPT, 9], (Weighted(a),))).max() < 2e-2
    engine.close()


def test_a_number_that_float16_cannot_hold_is_refused_by_name(half_gpu: Bench):
    engine = half_gpu.open()
    tensors = {AdapterTarget(0, "q"): (np.full((64, 1), 1e6, np.float32), np.ones((1, 64)))}
    with pytest.raises(AdapterInvalid, match=r"layers\.0\.q has numbers that float16 cannot"):
        engine.add_adapter(AdapterWeights("sha256:" + "0" * 64, tensors))
    engine.close()


def test_what_stands_around_factors_is_refused_by_name(gpu: Bench):
    engine = gpu.open()
    plain = random_adapter(QWEN2, 8)
    target = AdapterTarget(1, "o")
    vectors = {target: Vectors(scale=np.ones(64, np.float32))}
    with pytest.raises(AdapterInvalid, match=r"layers\.1\.o has DoRA"):
        engine.prepare(AdapterWeights(plain.digest, plain.tensors, vectors))
    head = {AdapterTarget(0, "head"): (np.ones((64, 1)), np.ones((1, 160)))}
    with pytest.raises(AdapterInvalid, match="head, for which the engine has no input"):
        engine.add_adapter(AdapterWeights(plain.digest, head))
    engine.close()


@pytest.mark.parametrize(
    ("used", "most", "bound"),
    [(0, 64, 0), (1, 64, 8), (8, 64, 8), (9, 64, 16), (33, 48, 48), (3, 4, 4)],
)
def test_columns_are_bound_in_few_sizes(used: int, most: int, bound: int):
    assert bucket(used, most) == bound


def test_any_free_columns_will_do_the_lowest_first():
    columns = Columns(6)
    columns.take([0, 1, 2, 3])
    columns.release([1])
    assert columns.free(3) == (1, 4, 5) and columns.free(4) is None
    assert runs((1, 4, 5)) == [(0, 1, 1), (1, 4, 2)]
    assert columns.end == 4
