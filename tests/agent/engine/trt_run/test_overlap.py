"""A prompt's chunk on its own stream beside decode steps: which calls, in which order, on which
memory. The emulator refuses work that nothing orders and that touches the same memory."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remora_agent.engine.cache import CacheEntry
from remora_agent.engine.protocol import Engine, MixEntry, RowStep
from remora_agent.engine.trt.cuda import Cuda
from remora_contract.errors import EngineFault, Exhausted, RequestInvalid
from remora_contract.targets import EXPERT_GROUPS, PARTS
from tests.agent.engine.portable import (
    EVERYTHING,
    MOE,
    QWEN2,
    Reference,
    Weighted,
    random_adapter,
    random_bundle,
    with_vectors,
)
from tests.support.cuda_emulator import cudaError_t
from tests.support.trt_engines import CHUNK, Bench, build

PROMPT = [3, 4, 5, 6]
LONG = [*range(20, 20 + 2 * CHUNK + 1)]  # of three chunks
CLOSE = 2e-5


def ids(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, np.int64)


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max() <= CLOSE)


@pytest.fixture
def engine(gpu: Bench):
    engine = gpu.open()
    for row in range(3):
        engine.prefill(row, ids([1, 2]), 0)
    engine.decode([RowStep(row, 7, 2) for row in range(3)])
    yield engine
    engine.close()


def decode(engine: Engine, rows: range, position: int = 3) -> np.ndarray:
    return engine.decode([RowStep(row, 7, position) for row in rows])


def since(gpu: Bench, action: Any) -> list[tuple]:
    before = len(gpu.cuda.calls)
    action()
    return gpu.cuda.calls[before:]


def test_a_chunk_waits_for_the_steps_and_steps_do_not_wait_for_it(gpu: Bench, engine: Engine):
    calls = since(gpu, lambda: engine.begin_prefill(3, ids(PROMPT), 0))
    kinds = [c[0] for c in calls]
    assert kinds == ["record", "wait", "copy", "copy", "record"]
    (_, queued, steps), (_, reads, waited) = calls[0], calls[1]
    assert queued == waited and reads != steps  # the event of the steps' stream, by another
    assert calls[-1][2] == reads
    calls = since(gpu, lambda: decode(engine, range(3)))
    assert [c for c in calls if c[0] in ("wait", "synchronize")] == [("synchronize", steps)]
    assert gpu.cuda.stream(reads).queue  # the chunk has not run
    assert gpu.cuda.order.overlapped > 0
    calls = since(gpu, engine.end_prefill)
    assert calls == [("synchronize", reads)]  # before its logits are looked at


def test_the_context_and_the_memory_of_a_chunk_are_its_own(gpu: Bench, engine: Engine):
    before = len(gpu.trt.calls)
    engine.begin_prefill(3, ids(PROMPT), 0)
    chunk = gpu.trt.calls[before:]
    before = len(gpu.trt.calls)
    decode(engine, range(3))
    step = gpu.trt.calls[before:]
    engine.end_prefill()
    assert {c[0] for c in chunk}.isdisjoint({c[0] for c in step})

    def places(calls: list[tuple]) -> dict[str, int]:
        return {c[2]: c[3] for c in calls if c[1] == "address"}

    mine, theirs = places(chunk), places(step)
    own = {n for n in mine if not n.startswith(("lora_a", "lora_b"))}
    assert all(mine[name] != theirs[name] for name in own)
    assert all(mine[name] == theirs[name] for name in mine.keys() - own)


def test_steps_leave_out_the_row_that_is_read(gpu: Bench, engine: Engine):
    """Three rows decode: a step takes three and not the four of its size."""
    engine.begin_prefill(3, ids(PROMPT), 0)
    before = len(gpu.trt.calls)
    decode(engine, range(3))
    shapes = {c[2]: c[3] for c in gpu.trt.calls[before:] if c[1] == "shape"}
    assert shapes["input_ids"] == (3, 1)
    engine.end_prefill()


def test_a_row_between_those_that_decode_changes_places_with_the_highest(
    gpu: Bench, reference: Reference
):
    engine = gpu.open()
    for row in (0, 1, 3):
        engine.prefill(row, ids([1, 2, row]), 0)
    engine.decode([RowStep(row, 7, 3) for row in (0, 1, 3)])
    blocks = list(gpu.cuda.live)
    calls = since(gpu, lambda: engine.begin_prefill(2, ids(PROMPT), 0))
    moved = [c for c in calls if c[0] == "copy" and c[1] == "cudaMemcpyDeviceToDevice"]
    assert len(moved) == 2 * QWEN2.layers  # of one row: the other held nothing
    assert calls.index(moved[-1]) < [c[0] for c in calls].index("record")
    for row, logits in zip((0, 1, 3), decode(engine, [0, 1, 3], 4), strict=True):
        assert close(logits, reference.logits([1, 2, row, 7, 7]))
    assert close(engine.end_prefill(), reference.logits(PROMPT))
    calls = since(gpu, lambda: engine.begin_prefill(2, ids(PROMPT), 0))
    assert not any(c[1] == "cudaMemcpyDeviceToDevice" for c in calls if c[0] == "copy")
    engine.end_prefill()
    assert gpu.cuda.live.count("Stream") == blocks.count("Stream")
    engine.close()


def test_a_step_of_a_row_above_waits(gpu: Bench, engine: Engine, reference: Reference):
    engine.prefill(3, ids([5]), 0)
    engine.decode([RowStep(0, 7, 3)])  # so that only row 0 counts as decoding
    engine.begin_prefill(1, ids(PROMPT), 0)
    logits = engine.decode([RowStep(3, 9, 1)])[0]
    assert close(logits, reference.logits([5, 9]))
    assert engine.prefill_ready()
    assert close(engine.end_prefill(), reference.logits(PROMPT))


def test_the_banks_writes_wait_for_the_chunk_too(gpu: Bench, monkeypatch: pytest.MonkeyPatch):
    engine = gpu.open()
    adapter = random_adapter(QWEN2, 1)
    mix = (MixEntry(engine.add_adapter(adapter), 1.0),)
    engine.begin_prefill(1, ids(PROMPT), 0, mix)
    engine.add_adapter(random_adapter(QWEN2, 2, rank=9))  # lays the bank out anew
    engine.end_prefill()
    engine.begin_prefill(1, ids(PROMPT), 0, mix)
    real, bank = Cuda.wait, engine._device.bank
    forgotten = bank._others[0]
    monkeypatch.setattr(Cuda, "wait", lambda s, on, e: None if e == forgotten else real(s, on, e))
    with pytest.raises(AssertionError, match="may run at the same time"):
        engine.remove_adapter(mix[0].handle)
    monkeypatch.undo()
    gpu.cuda.order.strict = False
    engine.close()


def test_a_chunk_that_does_not_wait_for_the_banks_writes_is_seen(
    gpu: Bench, monkeypatch: pytest.MonkeyPatch
):
    engine = gpu.open()
    monkeypatch.setattr(Cuda, "wait", lambda *_: None)
    mix = (MixEntry(engine.add_adapter(random_adapter(QWEN2, 1)), 1.0),)
    with pytest.raises(AssertionError, match="may run at the same time"):
        engine.begin_prefill(1, ids(PROMPT), 0, mix)
    monkeypatch.undo()
    gpu.cuda.order.strict = False
    engine.close()


def test_a_shape_is_captured_and_replayed_while_a_chunk_is_read(gpu: Bench, engine: Engine):
    engine.begin_prefill(3, ids(LONG), 0)
    captured = [c[0] for c in since(gpu, lambda: decode(engine, range(3)))]
    assert captured.count("begin_capture") == 1
    gpu.cuda.queries = repeat(False)
    assert not engine.prefill_ready()
    again = [c[0] for c in since(gpu, lambda: decode(engine, range(3), 4))]
    assert again.count("begin_capture") == 0 and again.count("launch") == 1
    engine.end_prefill()
    later = [c[0] for c in since(gpu, lambda: decode(engine, range(3), 5))]
    assert "launch" in later or "begin_capture" in later  # four rows again, as before
    assert gpu.cuda.order.overlapped > 0


def test_chunk_after_chunk_is_begun_when_the_one_before_has_run(
    gpu: Bench, engine: Engine, reference: Reference
):
    gpu.cuda.queries = chain([False, True, False], repeat(True))
    engine.begin_prefill(3, ids(LONG), 0)
    assert not engine.prefill_ready()
    calls = since(gpu, lambda: engine.prefill_ready())  # the first has run, the second begins
    assert [c[0] for c in calls].count("record") == 2
    decode(engine, range(3))
    assert engine.prefill_ready()
    assert close(engine.end_prefill(), reference.logits(LONG))


@pytest.mark.parametrize("row", [1, 3])
def test_a_chunk_that_is_not_enqueued_leaves_its_row_as_it_was(
    gpu: Bench, engine: Engine, reference: Reference, row: int
):
    gpu.trt.fail_enqueue = True
    with pytest.raises(EngineFault):
        engine.begin_prefill(row, ids(PROMPT), 0)
    gpu.trt.fail_enqueue = False
    assert engine._device.cache.lengths[row] == (3 if row == 1 else 0)
    assert close(decode(engine, range(1))[0], reference.logits([1, 2, 7, 7]))
    engine.begin_prefill(row, ids(PROMPT), 0)
    assert close(engine.end_prefill(), reference.logits(PROMPT))


def test_rows_that_half_changed_places_hold_nothing_rather_than_something_else(
    gpu: Bench, engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    whole, copies = gpu.cuda.cudaMemcpy2DAsync, iter(range(99))

    def second_fails(*args: Any) -> tuple:
        return (cudaError_t.cudaErrorInvalidValue,) if next(copies) == 1 else whole(*args)

    monkeypatch.setattr(gpu.cuda, "cudaMemcpy2DAsync", second_fails)
    with pytest.raises(EngineFault):
        engine.begin_prefill(1, ids(PROMPT), 0)  # changes places with row 2
    monkeypatch.undo()
    for row in (1, 2):
        with pytest.raises(RequestInvalid):
            engine.decode([RowStep(row, 7, 3)])
    assert decode(engine, range(1)).shape == (1, QWEN2.vocab)


def test_a_later_chunk_that_fails_is_told_at_the_end_and_steps_go_on(
    gpu: Bench, engine: Engine, reference: Reference
):
    engine.begin_prefill(3, ids(LONG), 0)
    gpu.trt.fail_enqueue = True
    assert engine.prefill_ready()  # there is nothing to wait for
    gpu.trt.fail_enqueue = False
    assert close(decode(engine, range(3))[0], reference.logits([1, 2, 7, 7]))
    with pytest.raises(EngineFault):
        engine.end_prefill()
    assert engine._device.cache.lengths[3] == CHUNK
    engine.begin_prefill(3, ids(LONG), 0)
    assert close(engine.end_prefill(), reference.logits(LONG))


def test_a_fault_that_a_question_finds_is_told_at_the_end(gpu: Bench, engine: Engine):
    engine.begin_prefill(3, ids(PROMPT), 0)
    gpu.cuda.fail["cudaEventQuery"] = cudaError_t.cudaErrorIllegalAddress
    assert engine.prefill_ready()
    with pytest.raises(EngineFault, match="cudaErrorIllegalAddress"):
        engine.end_prefill()


def test_an_engine_closed_over_a_chunk_frees_everything(gpu: Bench):
    engine = gpu.open()
    engine.begin_prefill(1, ids(LONG), 0)
    engine.close()
    assert gpu.cuda.live == [] and gpu.trt.contexts == gpu.trt.engines == 0


@pytest.mark.parametrize("call", ["cudaEventCreateWithFlags", "cudaStreamCreateWithFlags"])
def test_a_loading_that_fails_late_leaves_nothing(gpu: Bench, call: str):
    whole, count = getattr(gpu.cuda, call), iter(range(9))

    def failing(flags: int) -> tuple:
        if next(count) == 2:  # what the overlap adds
            return cudaError_t.cudaErrorMemoryAllocation, None
        return whole(flags)

    setattr(gpu.cuda, call, failing)
    with pytest.raises(Exhausted):
        gpu.open()
    assert gpu.cuda.live == [] and gpu.trt.contexts == gpu.trt.engines == 0


ROWS = range(4)
ACTIONS = st.one_of(
    st.tuples(st.just("begin"), st.sampled_from(ROWS), st.integers(1, 11)),
    st.tuples(st.just("ask")),
    st.tuples(st.just("end")),
    st.tuples(st.just("decode"), st.sets(st.sampled_from(ROWS), min_size=1)),
    st.tuples(st.just("prefill"), st.sampled_from(ROWS), st.integers(1, 7)),
    st.tuples(st.just("swap"), st.integers(1, 9)),
    st.tuples(st.just("copy"), st.permutations(list(ROWS))),
)


class Twins:
    """One engine that reads prompts beside steps and one that does not, asked the same. `held`:
    tokens of each row, as both must have them."""

    def __init__(self, bundle: Path, entry: CacheEntry, queries: list[bool]) -> None:
        self.gpus = [Bench(bundle, entry) for _ in range(2)]
        self.gpus[0].cuda.queries = chain(queries, repeat(True))
        self.both = [g.open(overlap=o) for g, o in zip(self.gpus, ("auto", "off"), strict=True)]
        self.held: dict[int, list[int]] = {row: [] for row in ROWS}
        self.adapters: list[tuple[int, int]] = []
        self.flying: int | None = None
        self.later: np.ndarray | None = None  # the other engine's answer to what flies
        self.seed = 0

    def mix(self, index: int) -> tuple[tuple[MixEntry, ...], ...]:
        if not self.adapters:
            return (), ()
        pair = self.adapters[0]
        return tuple((MixEntry(handle, 0.5 + index / 8),) for handle in pair)

    def begin(self, row: int, count: int) -> None:
        if self.flying is not None:
            return
        start = min(len(self.held[row]), 48 - count)
        tokens = [(7 * row + i) % QWEN2.vocab for i in range(count)]
        first, second = self.mix(row)
        self.both[0].begin_prefill(row, ids(tokens), start, first)
        self.later = self.both[1].prefill(row, ids(tokens), start, second)
        self.held[row] = [*self.held[row][:start], *tokens]
        self.flying = row

    def ask(self) -> None:
        if self.flying is not None:
            self.both[0].prefill_ready()

    def end(self) -> None:
        if self.flying is not None:
            assert close(self.both[0].end_prefill(), self.later)
            self.flying = None

    def decode(self, rows: set[int]) -> None:
        chosen = [r for r in sorted(rows) if r != self.flying and len(self.held[r]) < 48]
        if not chosen:
            return
        answers = []
        for i, engine in enumerate(self.both):
            steps = [RowStep(r, 11 + r, len(self.held[r]), self.mix(r)[i]) for r in chosen]
            answers.append(engine.decode(steps))
        assert close(*answers)
        for row in chosen:
            self.held[row].append(11 + row)

    def prefill(self, row: int, count: int) -> None:
        if row == self.flying:
            return
        tokens = ids([30 + row] * count)
        answers = [e.prefill(row, tokens, 0, self.mix(row)[i]) for i, e in enumerate(self.both)]
        assert close(*answers)
        self.held[row] = list(tokens)

    def swap(self, rank: int) -> None:
        self.seed += 1
        if len(self.adapters) > 1:
            old = self.adapters.pop()
            for engine, handle in zip(self.both, old, strict=True):
                engine.remove_adapter(handle)
        weights = random_adapter(QWEN2, self.seed, rank=rank)
        self.adapters.append(tuple(engine.add_adapter(weights) for engine in self.both))

    def copy(self, rows: list[int]) -> None:
        src, dst = rows[:2]
        if not self.held[src] or self.flying in (src, dst):
            return
        blocks = [e.read_kv(src, 0, len(self.held[src])) for e in self.both]
        for engine, block in zip(self.both, blocks, strict=True):
            engine.write_kv(dst, 0, block)
        assert close(blocks[0].arrays[0], blocks[1].arrays[0])
        self.held[dst] = list(self.held[src])


@settings(max_examples=40, deadline=None)
@given(st.lists(ACTIONS, max_size=14), st.lists(st.booleans(), max_size=12))
def test_whatever_runs_beside_whatever_all_answers_are_those_of_the_serial_order(
    trt_bundle: Path, trt_entry: CacheEntry, actions: list[tuple], queries: list[bool]
):
    twins = Twins(trt_bundle, trt_entry, queries)
    for name, *args in [("begin", 1, 4), ("decode", {0}), *actions, ("end",)]:
        getattr(twins, name)(*args)
    for row in ROWS:
        twins.decode({row})
    for engine in twins.both:
        engine.close()


def test_rows_change_their_vectors_while_a_prompt_is_read(tmp_path: Path):
    """DoRA, biases and experts' adapters in every row, adapters that come and go meanwhile: answers
    are the portable graph's, and nothing unordered touches the same memory."""
    graph = replace(EVERYTHING, max_bank_rank=64)
    bundle = random_bundle(tmp_path / "bundle", MOE, graph)
    gpu = Bench(bundle, build(bundle, tmp_path / "engine"))
    engine, reference, random = gpu.open(), Reference(bundle), np.random.default_rng(0)
    experts = tuple(p for group in EXPERT_GROUPS for p in PARTS[group])
    kinds = [
        with_vectors(random_adapter(MOE, 1, 3), MOE, 1, dora=True, bias=True),
        with_vectors(random_adapter(MOE, 2, 2), MOE, 2, bias=True),
        random_adapter(MOE, 3, 3, projections=experts),
    ]
    mixes = [((MixEntry(engine.add_adapter(k), 1.0),), (Weighted(k),)) for k in kinds]
    mixes.append(((), ()))
    for turn in range(8):
        held = {r: [3, 4, 5] for r in range(4) if r != turn % 4}
        used = {r: mixes[(r + turn) % 4] for r in held}
        for r, tokens in held.items():
            engine.prefill(r, np.array(tokens), 0, used[r][0])
        mix, weighted = mixes[int(random.integers(0, 4))]
        prompt = random.integers(0, MOE.vocab, 12)
        engine.begin_prefill(turn % 4, prompt, 0, mix)
        other = engine.add_adapter(random_adapter(MOE, 50 + turn, 9))
        for step in range(3):
            rows = [r for r in held if (r + step) % 3]
            steps = [RowStep(r, 9 + step, len(held[r]), used[r][0]) for r in rows]
            for r, logits in zip(rows, engine.decode(steps), strict=True):
                held[r] = [*held[r], 9 + step]
                assert np.abs(logits - reference.logits(held[r], used[r][1])).max() < 5e-5
        engine.remove_adapter(other)
        wanted = reference.logits(prompt.tolist(), weighted)
        assert np.abs(engine.end_prefill() - wanted).max() < 5e-5
    engine.close()
