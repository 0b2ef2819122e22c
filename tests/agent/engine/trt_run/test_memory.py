"""No memory, no leak, no use after the end."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from remora_agent.engine.protocol import Engine, MixEntry, RowStep
from remora_contract.errors import EngineFault, Exhausted, Unavailable
from tests.agent.engine.portable import QWEN2, Reference, random_adapter
from tests.support.cuda_emulator import cudaError_t
from tests.support.trt_engines import Bench

PROMPT = [3, 4, 5, 6, 7, 80, 11, 12]
NO_MEMORY = cudaError_t.cudaErrorMemoryAllocation
ILLEGAL = cudaError_t.cudaErrorIllegalAddress


def ids(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, np.int64)


def answers(engine: Engine, reference: Reference) -> None:
    """Row 0, anew."""
    engine.prefill(0, ids(PROMPT), 0)
    logits = engine.decode([RowStep(0, 9, len(PROMPT))])[0]
    assert np.abs(logits - reference.logits([*PROMPT, 9])).max() < 2e-5


def test_a_closed_engine_has_given_everything_back(gpu: Bench):
    engine = gpu.open()
    handle = engine.add_adapter(random_adapter(QWEN2, 1))
    for row in range(4):
        engine.prefill(row, ids(PROMPT), 0)
        engine.decode([RowStep(row, 1, 8, (MixEntry(handle, 1.0),))])
    assert gpu.cuda.live and gpu.trt.contexts
    engine.close()
    engine.close()
    assert gpu.cuda.live == [] and gpu.trt.contexts == gpu.trt.engines == 0


def test_an_engine_may_be_closed_with_writes_still_queued(gpu: Bench):
    engine = gpu.open()
    handle = engine.add_adapter(random_adapter(QWEN2, 1))
    engine.remove_adapter(handle)
    engine.close()
    assert gpu.cuda.live == []


@pytest.mark.parametrize("call", ["prefill", "decode", "add", "remove", "read", "score", "embed"])
def test_nothing_runs_after_the_end(gpu: Bench, call: str):
    engine = gpu.open()
    handle = engine.add_adapter(random_adapter(QWEN2, 1))
    engine.close()
    calls: dict[str, Callable[[], object]] = {
        "prefill": lambda: engine.prefill(0, ids(PROMPT), 0),
        "decode": lambda: engine.decode([RowStep(0, 1, 0)]),
        "add": lambda: engine.add_adapter(random_adapter(QWEN2, 2)),
        "remove": lambda: engine.remove_adapter(handle),
        "read": lambda: engine.read_kv(0, 0, 1),
        "score": lambda: engine.score(0, ids(PROMPT), 0),
        "embed": lambda: engine.embed(0, ids(PROMPT), 0),
    }
    with pytest.raises(Unavailable, match="closed"):
        calls[call]()


def test_many_steps_and_swaps_allocate_nothing(gpu: Bench):
    engine = gpu.open()
    kinds = [random_adapter(QWEN2, s, rank=2) for s in range(3)]
    engine.prefill(0, ids(PROMPT), 0)

    def turn(i: int) -> None:
        handle = engine.add_adapter(kinds[i % 3])
        engine.decode([RowStep(0, i % 100, 8, (MixEntry(handle, 1.0),))])
        engine.remove_adapter(handle)

    turn(0)
    before = (len(gpu.cuda.live), gpu.cuda.used, gpu.trt.contexts)
    for i in range(60):
        turn(i)
    assert (len(gpu.cuda.live), gpu.cuda.used, gpu.trt.contexts) == before
    engine.close()


def test_an_engine_that_does_not_fit_is_refused_and_leaves_nothing(make_gpu):
    whole = make_gpu(1 << 30)
    engine = whole.open()
    need = whole.cuda.used
    engine.close()
    for memory in (0, need // 3, need - 1):
        small = make_gpu(memory)
        with pytest.raises(Exhausted, match="bytes for"):
            small.open()
        assert small.cuda.live == []
    exact = make_gpu(need)
    exact.open().close()


@pytest.mark.parametrize("call", ["cudaGraphInstantiate", "cudaStreamEndCapture"])
def test_no_memory_for_a_graph_ends_that_step_and_the_engine_lives(
    gpu: Bench, reference: Reference, call: str
):
    engine = gpu.open()
    engine.prefill(0, ids(PROMPT), 0)
    gpu.cuda.fail[call] = NO_MEMORY
    with pytest.raises(Exhausted, match=f"{call} failed with cudaErrorMemoryAllocation"):
        engine.decode([RowStep(0, 9, 8)])
    logits = engine.decode([RowStep(0, 9, 8)])[0]
    assert np.abs(logits - reference.logits([*PROMPT, 9])).max() < 2e-5
    engine.close()
    assert gpu.cuda.live == [] and gpu.trt.contexts == 0


def test_no_memory_for_a_context_ends_that_step_and_the_engine_lives(
    gpu: Bench, reference: Reference
):
    engine = gpu.open()
    engine.prefill(0, ids(PROMPT), 0)
    gpu.trt.fail_contexts = True
    with pytest.raises(Exhausted, match="execution context"):
        engine.decode([RowStep(0, 9, 8)])
    gpu.trt.fail_contexts = False
    answers(engine, reference)
    engine.close()


def test_a_step_that_tensorrt_refuses_is_a_fault_and_not_a_capture_left_open(
    gpu: Bench, reference: Reference
):
    engine = gpu.open()
    engine.prefill(0, ids(PROMPT), 0)
    gpu.trt.fail_enqueue = True
    with pytest.raises(EngineFault, match="enqueue"):
        engine.decode([RowStep(0, 9, 8)])
    gpu.trt.fail_enqueue = False
    answers(engine, reference)
    engine.close()
    assert gpu.cuda.live == []


def test_a_capture_that_fails_half_way_is_abandoned(gpu: Bench, reference: Reference, monkeypatch):
    engine = gpu.open()
    engine.prefill(0, ids(PROMPT), 0)
    begin = gpu.cuda.cudaStreamBeginCapture

    def then_fail(*args):
        gpu.cuda.fail["cudaMemcpyAsync"] = cudaError_t.cudaErrorInvalidValue
        return begin(*args)

    monkeypatch.setattr(gpu.cuda, "cudaStreamBeginCapture", then_fail)
    with pytest.raises(EngineFault, match="cudaMemcpyAsync"):
        engine.decode([RowStep(0, 9, 8)])
    monkeypatch.undo()
    answers(engine, reference)
    engine.close()
    assert gpu.cuda.live == []


def test_a_fault_seen_at_the_wait_names_the_call_and_the_row_is_unchanged(
    gpu: Bench, reference: Reference
):
    engine = gpu.open()
    engine.prefill(0, ids(PROMPT), 0)
    gpu.cuda.fail["cudaStreamSynchronize"] = ILLEGAL
    with pytest.raises(EngineFault, match="cudaStreamSynchronize failed with cudaErrorIllegal"):
        engine.decode([RowStep(0, 9, 8)])
    answers(engine, reference)
    engine.close()


def test_a_full_row_keeps_its_last_token_though_the_step_beside_it_fails(
    gpu: Bench, reference: Reference
):
    engine = gpu.open()
    full = [(7 * i) % 160 for i in range(48)]
    engine.prefill(0, ids(full), 0)
    engine.prefill(1, ids(PROMPT), 0)
    held = engine.read_kv(0, 0, 48).arrays[0]
    gpu.cuda.fail["cudaGraphInstantiate"] = NO_MEMORY
    with pytest.raises(Exhausted):
        engine.decode([RowStep(1, 9, 8)])
    assert np.array_equal(engine.read_kv(0, 0, 48).arrays[0], held)
    engine.decode([RowStep(1, 9, 8)])
    assert np.array_equal(engine.read_kv(0, 0, 48).arrays[0], held)
    engine.close()


def test_a_closing_that_fails_frees_the_rest(gpu: Bench):
    engine = gpu.open()
    engine.prefill(0, ids(PROMPT), 0)
    gpu.cuda.fail["cudaStreamSynchronize"] = ILLEGAL
    with pytest.raises(EngineFault):
        engine.close()
    assert gpu.cuda.live == []
    engine.close()


@pytest.mark.parametrize("call", ["cudaFree", "cudaGraphExecDestroy", "cudaEventDestroy"])
def test_one_thing_that_cannot_be_freed_does_not_keep_the_others(gpu: Bench, call: str):
    engine = gpu.open()
    for row in range(2):
        engine.prefill(row, ids(PROMPT), 0)
        engine.decode([RowStep(row, 1, 8)])
    if call == "cudaEventDestroy":
        gpu.cuda.cudaEventDestroy = lambda event: (ILLEGAL,)
    else:
        gpu.cuda.fail[call] = ILLEGAL
    with pytest.raises(EngineFault, match=call):
        engine.close()
    assert len(gpu.cuda.live) == (4 if call == "cudaEventDestroy" else 1)


@pytest.mark.parametrize(
    "call",
    ["cudaStreamCreateWithFlags", "cudaEventCreateWithFlags", "cudaHostAlloc", "cudaMemsetAsync"],
)
def test_a_loading_that_fails_leaves_nothing(gpu: Bench, call: str):
    gpu.cuda.fail[call] = NO_MEMORY
    with pytest.raises(Exhausted):
        gpu.open()
    assert gpu.cuda.live == [] and gpu.trt.contexts == gpu.trt.engines == 0


def test_no_memory_for_the_prompts_context_leaves_nothing(gpu: Bench):
    gpu.trt.fail_contexts = True
    with pytest.raises(Exhausted, match="execution context"):
        gpu.open()
    assert gpu.cuda.live == []
