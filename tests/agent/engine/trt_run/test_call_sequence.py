"""What the engine asks of CUDA and TensorRT, in which order, on which addresses."""

from __future__ import annotations

import numpy as np
import pytest

from remora_agent.engine.protocol import Engine, MixEntry, RowStep
from remora_agent.engine.trt.graphs import StepGraphs
from tests.agent.engine.portable import QWEN2, random_adapter
from tests.support.trt_engines import Bench

LAYERS = range(QWEN2.layers)


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int64)


def calls_of(gpu: Bench, action) -> list[tuple]:
    """TensorRT calls that an action makes, without the context's identity."""
    before = len(gpu.trt.calls)
    action()
    return [c[1:] for c in gpu.trt.calls[before:]]


def launches(gpu: Bench) -> int:
    return sum(c[0] == "launch" for c in gpu.cuda.calls)


def captures(gpu: Bench) -> int:
    return sum(c[0] == "begin_capture" for c in gpu.cuda.calls)


def decode(engine: Engine, rows: range, mix=()) -> np.ndarray:
    return engine.decode([RowStep(r, 7, 2, mix) for r in rows])


@pytest.fixture
def engine(gpu: Bench):
    engine = gpu.open()
    for row in range(4):
        engine.prefill(row, ids(1, 2), 0)
    yield engine
    engine.close()


def test_shapes_come_before_addresses_and_both_before_the_enqueue(gpu: Bench, engine: Engine):
    kinds = [c[0] for c in calls_of(gpu, lambda: engine.prefill(0, ids(3, 4, 5), 2))]
    assert kinds[-1] == "enqueue" and kinds.count("enqueue") == 1
    assert "shape" not in kinds[kinds.index("address") :]
    kinds = [c[0] for c in calls_of(gpu, lambda: decode(engine, range(1)))]
    assert kinds[0] == "profile"  # of a context made for the shape
    assert kinds[-2:] == ["enqueue", "enqueue"]  # the step itself, then its capture


def test_past_and_present_are_one_address_and_a_rows_slice_its_own(gpu: Bench, engine: Engine):
    def bound(row: int) -> dict[str, int]:
        calls = calls_of(gpu, lambda: engine.prefill(row, ids(3), 2))
        return {c[1]: c[2] for c in calls if c[0] == "address"}

    zero, two = bound(0), bound(2)
    stride = QWEN2.kv_heads * 48 * QWEN2.head_dim * 4
    for layer in LAYERS:
        for kind in ("key", "value"):
            past, present = f"past_{kind}.{layer}", f"present_{kind}.{layer}"
            assert zero[past] == zero[present] and two[past] == two[present]
            assert two[past] - zero[past] == 2 * stride
    changed = {n for n in zero if zero[n] != two[n]}
    assert all(n.startswith(("past_", "present_")) for n in changed)


def test_a_shape_is_captured_once_and_then_only_launched(gpu: Bench, engine: Engine):
    decode(engine, range(2))
    assert captures(gpu) == 1 and launches(gpu) == 0
    assert calls_of(gpu, lambda: decode(engine, range(2))) == []
    assert captures(gpu) == 1 and launches(gpu) == 1


def test_rows_are_computed_in_powers_of_two_from_the_first(gpu: Bench, engine: Engine):
    for rows, batch in ((range(1), 1), (range(2), 2), (range(2, 3), 4), (range(4), 4)):
        calls = calls_of(gpu, lambda rows=rows: decode(engine, rows))
        shapes = {c[1]: c[2] for c in calls if c[0] == "shape"}
        if shapes:  # else replayed
            assert shapes["input_ids"] == (batch, 1)
    assert captures(gpu) == 3


def test_every_adapter_mix_of_one_layout_replays_one_graph(gpu: Bench, engine: Engine):
    a, b = (engine.add_adapter(random_adapter(QWEN2, s, rank=2)) for s in (1, 2))
    for mix in (
        (MixEntry(a, 1.0),),
        (MixEntry(b, 0.5),),
        (MixEntry(a, 0.3), MixEntry(b, 0.7)),
    ):
        decode(engine, range(2), mix)
    assert captures(gpu) == 1 and launches(gpu) == 2
    engine.remove_adapter(a)
    c = engine.add_adapter(random_adapter(QWEN2, 3, rank=2))
    decode(engine, range(2), (MixEntry(c, 1.0),))
    assert captures(gpu) == 1  # a swap changes bytes, not shapes


def test_rows_without_an_adapter_bind_no_columns(gpu: Bench, engine: Engine):
    engine.add_adapter(random_adapter(QWEN2, 1))
    calls = calls_of(gpu, lambda: decode(engine, range(1)))
    shapes = {c[1]: c[2] for c in calls if c[0] == "shape"}
    assert shapes["lora_a.0.qkv"] == (QWEN2.hidden, 0) and shapes["lora_gate.o"] == (1, 1, 0)


def test_more_columns_are_another_graph_and_only_groups_in_use_are_bound(
    gpu: Bench, engine: Engine
):
    a = engine.add_adapter(random_adapter(QWEN2, 1, rank=2, projections=("q",)))

    def bound() -> tuple[int, ...]:
        calls = calls_of(gpu, lambda: decode(engine, range(1), (MixEntry(a, 1.0),)))
        shapes = {c[1]: c[2] for c in calls if c[0] == "shape"}
        return tuple(shapes[f"lora_gate.{g}"][2] for g in ("qkv", "o", "gate_up", "down"))

    assert bound() == (8, 0, 0, 0)
    engine.add_adapter(random_adapter(QWEN2, 2, rank=9, projections=("k", "down")))
    assert bound() == (16, 0, 0, 16)
    assert captures(gpu) == 2


def test_graphs_beyond_what_is_kept_are_destroyed_and_captured_anew(
    gpu: Bench, monkeypatch: pytest.MonkeyPatch
):
    defaults = (1,)
    monkeypatch.setattr(StepGraphs.__init__, "__defaults__", defaults)
    engine = gpu.open()
    for row in range(2):
        engine.prefill(row, ids(1, 2), 0)
    wanted = decode(engine, range(2))
    decode(engine, range(1))
    assert np.array_equal(decode(engine, range(2)), wanted)
    assert captures(gpu) == 3
    assert gpu.cuda.live.count("GraphExec") == 1
    engine.close()


def test_a_step_moves_its_inputs_by_one_copy_and_its_logits_by_one(gpu: Bench, engine: Engine):
    decode(engine, range(4))
    before = len(gpu.cuda.calls)
    decode(engine, range(4))
    kinds = [c[0] for c in gpu.cuda.calls[before:]]
    assert kinds == ["launch", "copy", "record", "synchronize"]


def test_a_replay_answers_with_the_same_bits_as_the_first_run(gpu: Bench, engine: Engine):
    first = decode(engine, range(4))
    assert np.array_equal(decode(engine, range(4)), first)
    assert launches(gpu) == 1


def test_what_cannot_be_captured_is_enqueued_every_time(gpu: Bench, engine: Engine):
    """As trtexec does, with the answers of a step that was captured."""
    wanted = decode(engine, range(1))
    gpu.trt.fail_capture = True
    other = gpu.open()
    other.prefill(0, ids(1, 2), 0)
    before = captures(gpu)
    for tries in (1, 1, 1):
        assert np.array_equal(decode(other, range(1)), wanted)
        assert captures(gpu) - before == tries
    other.close()


def test_an_adapter_smaller_than_the_staging_memory_is_written_without_waiting(
    gpu: Bench, engine: Engine
):
    before = len(gpu.cuda.calls)
    engine.remove_adapter(engine.add_adapter(random_adapter(QWEN2, 1)))
    kinds = [c[0] for c in gpu.cuda.calls[before:]]
    assert "copy" in kinds and "synchronize" not in kinds
