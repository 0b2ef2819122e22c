"""A step that the runtime fails in leaves nothing that the next one trips over."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from remora_agent.engine.cache import EngineCache
from remora_agent.engine.opening import EngineOptions, ensure_built
from remora_agent.engine.ort import slots
from remora_agent.engine.ort.engine import OrtEngine
from remora_agent.engine.ort.session import Session
from remora_agent.engine.protocol import MixEntry, RowStep
from remora_contract.errors import EngineFault, Exhausted, RemoraError
from tests.agent.engine.conftest import CASES, Bench, Case
from tests.agent.engine.portable import FLOAT32, QWEN2, random_adapter, random_bundle

PROMPT = np.array([3, 4, 5, 6, 7, 80, 11, 12], np.int64)


class FailingOnce:
    """A session of the runtime whose next run fails."""

    def __init__(self, session: object, words: str) -> None:
        self._session, self._words, self._failed = session, words, False

    def run_with_iobinding(self, binding: object) -> None:
        if not self._failed:
            self._failed = True
            raise RuntimeError(self._words)
        self._session.run_with_iobinding(binding)


@pytest.mark.parametrize("asked", ["score", "embed"])
def test_a_row_is_read_in_another_length_after_a_step_that_failed(
    make_bench: Callable[[Case], Bench], asked: str
):
    engine = make_bench(CASES["ort-float32"]).open()
    read, session = getattr(engine, asked), engine._base
    assert isinstance(session, Session)
    wanted = read(1, PROMPT, 0)
    session._session = FailingOnce(session._session, "the kernel fell over")
    with pytest.raises(EngineFault, match="fell over"):
        read(1, PROMPT[:3], 0)
    assert np.array_equal(read(1, PROMPT, 0), wanted)
    engine.close()


# What ONNX Runtime 1.32 said, cut to the end: the arena at the system's limit, the arena at its
# own, and without an arena.
NO_MEMORY = (
    "AllocateRawInternal(size_t, bool, onnxruntime::Stream*) Failed to allocate memory for "
    "requested buffer of size 1600000000",
    "AllocateRawInternal(size_t, bool, onnxruntime::Stream*) Available memory of 8387328 is "
    "smaller than requested bytes of 64000000",
    "Non-zero status code returned while running MatMul node. Status Message: std::bad_alloc",
)


@pytest.mark.parametrize(
    ("words", "raised"), [*((w, Exhausted) for w in NO_MEMORY), ("invalid shape", EngineFault)]
)
def test_no_memory_for_a_step_is_told_apart_from_a_fault(
    make_bench: Callable[[Case], Bench], words: str, raised: type[RemoraError]
):
    engine = make_bench(CASES["ort-float32"]).open()
    engine.prefill(1, PROMPT, 0)
    wanted = engine.decode([RowStep(1, 9, len(PROMPT))]).copy()
    engine._base._session = FailingOnce(engine._base._session, words)
    with pytest.raises(RemoraError) as failed:
        engine.decode([RowStep(1, 9, len(PROMPT))])
    assert type(failed.value) is raised and words[-20:] in str(failed.value)
    assert np.array_equal(engine.decode([RowStep(1, 9, len(PROMPT))]), wanted)
    engine.close()


def test_slots_that_were_filled_in_part_are_made_anew(
    make_bench: Callable[[Case], Bench], monkeypatch: pytest.MonkeyPatch
):
    """The last group's slots find no memory to grow: those before have already."""
    bench = make_bench(CASES["ort-float32"])
    adapters = [random_adapter(bench.spec, i, rank) for i, rank in ((1, 2), (2, 12))]

    def opened() -> tuple[OrtEngine, list[RowStep], list[RowStep]]:
        engine = bench.open()
        assert isinstance(engine, OrtEngine)
        narrow, wide = ((MixEntry(engine.add_adapter(a), 1.0),) for a in adapters)
        for row in range(2):
            engine.prefill(row, PROMPT, 0)
        first = RowStep(0, 9, 8, narrow)
        return engine, [first, RowStep(1, 9, 8)], [first, RowStep(1, 9, 8, wide)]

    other, _, wider = opened()
    wanted = other.decode(wider).copy()
    engine, steps, wider = opened()
    engine.decode(steps)
    assert engine._slots is not None
    last, made = engine._slots._groups[-1], slots._GroupSlots._allocate

    def none(self: slots._GroupSlots, rank: int) -> None:
        if self is last:
            self._rank = rank  # as far as it comes
            raise MemoryError("Unable to allocate 1. GiB for an array")
        made(self, rank)

    monkeypatch.setattr(slots._GroupSlots, "_allocate", none)
    with pytest.raises(Exhausted, match="decode failed for want of memory"):
        engine.decode(wider)
    assert np.array_equal(engine.decode(wider), wanted)
    engine.close()
    other.close()


def test_an_adapter_that_finds_no_memory_keeps_no_place_in_the_bank(
    make_bench: Callable[[Case], Bench], monkeypatch: pytest.MonkeyPatch
):
    bench = make_bench(CASES["ort-float32"])
    engine = bench.open()
    whole = random_adapter(bench.spec, 1, rank=bench.case.graph.max_bank_rank)

    def none(*args: object) -> None:
        raise MemoryError

    with monkeypatch.context() as without, pytest.raises(Exhausted):
        without.setattr("remora_agent.engine.ort.bank.pack", none)
        engine.add_adapter(whole)
    engine.remove_adapter(engine.add_adapter(whole))
    engine.close()


def test_a_prompt_that_finds_no_memory_ends_alone_and_the_engine_lives(
    tmp_path: Path, engine_cache: EngineCache
):
    """For real: in a child whose address space is limited. Steps before and after, with an adapter
    and without, give the same bits, and a prompt that fits is read in the same row."""
    spec = replace(QWEN2, intermediate=8192, layers=1)
    bundle = random_bundle(tmp_path / "b", spec, replace(FLOAT32, context=1024))
    options = EngineOptions(rows=3, threads=1, prefill="plain")
    entry = ensure_built(bundle, engine_cache, options).entry
    ended = subprocess.run(
        [sys.executable, "-m", "tests.agent.engine.ort_memory_child", bundle, entry.directory],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert [name for name, _, _ in found["refused"]] == ["Exhausted", "Exhausted"], found
    assert all("for want of memory" in text and wait for _, text, wait in found["refused"])
    assert found["same"]
