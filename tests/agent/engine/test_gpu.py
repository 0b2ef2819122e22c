"""The TensorRT engine on a real GPU: built, loaded and held to the float16 graph on ONNX Runtime.

    pytest -m gpu tests/agent/engine/test_gpu.py          benchmarks/gpu.sh runs this and more

Without a GPU, CUDA's bindings or a TensorRT module every test is skipped and says which is missing.
With REMORA_GPU_EMULATED=1 they run on the emulators. What needs no GPU (order of calls, memory) is
in trt_run/; the conformance suite has cases marked gpu.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from remora_agent.engine.protocol import Engine, MixEntry, RowStep, Watch
from remora_agent.engine.trt.cuda import Cuda
from remora_agent.engine.trt.graphs import StepGraphs
from remora_agent.engine.trt.inputs import StepShape
from remora_agent.engine.trt.module import TRT_BACKENDS
from remora_contract.bundle import GraphSpec
from remora_contract.errors import Unavailable, Unsupported
from tests.agent.engine.portable import (
    FLOAT16,
    QWEN2,
    Reference,
    Weighted,
    random_adapter,
    random_bundle,
    with_vectors,
)
from tests.support import gpu

pytestmark = pytest.mark.gpu

# As large as TensorRT's fused attention wants its heads.
SPEC = replace(QWEN2, hidden=256, heads=4, kv_heads=2, head_dim=64, intermediate=384)
GRAPH = replace(FLOAT16, context=128, max_bank_rank=64)
PROMPT = [3, 4, 5, 6, 7, 80, 11, 12]
CLOSE = 2e-2
LEAK_STEPS = int(os.environ.get("REMORA_GPU_STEPS", "10000"))
LEAK_BYTES = 8 << 20  # of the driver's own book-keeping


@dataclass(frozen=True)
class GpuBench:
    reference: Reference
    cuda: Cuda
    open: Callable[[], Engine]


@pytest.fixture(scope="module", params=TRT_BACKENDS)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GpuBench:
    return made(request.param, tmp_path_factory.mktemp(request.param), GRAPH)


@pytest.fixture(scope="module", params=TRT_BACKENDS)
def around(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GpuBench:
    """Of a bundle with what may stand around factors."""
    graph = replace(GRAPH, dora=True, adapter_bias=True)
    return made(request.param, tmp_path_factory.mktemp(f"{request.param}-around"), graph)


def made(backend: str, root: Path, graph: GraphSpec) -> GpuBench:
    directory = random_bundle(root / "bundle", SPEC, graph)
    try:
        engines = gpu.engines(backend, directory, root)
    except (Unavailable, Unsupported) as e:
        pytest.skip(str(e))
    return GpuBench(Reference(directory), engines.cuda, engines.open)


@pytest.fixture
def engine(bench: GpuBench) -> Iterator[Engine]:
    engine = bench.open()
    yield engine
    engine.close()


def ids(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, np.int64)


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max() <= CLOSE * max(1.0, float(np.abs(b).max())))


def test_prompts_and_steps_answer_as_the_portable_graph(bench: GpuBench, engine: Engine):
    tokens = list(PROMPT)
    assert close(engine.prefill(2, ids(tokens), 0), bench.reference.logits(tokens))
    for token in range(20, 36):
        logits = engine.decode([RowStep(2, token, len(tokens))])[0]
        tokens.append(token)
        assert close(logits, bench.reference.logits(tokens))


def test_greedy_tokens_are_the_portable_graphs(bench: GpuBench, engine: Engine):
    """As far as its two best logits are further apart than float16 tells them."""
    tokens = list(PROMPT)
    logits = engine.prefill(0, ids(tokens), 0)
    for _ in range(24):
        wanted = bench.reference.logits(tokens)
        second, best = np.sort(wanted)[-2:]
        if best - second > 2 * CLOSE:
            assert int(logits.argmax()) == int(wanted.argmax())
        tokens.append(int(wanted.argmax()))
        logits = engine.decode([RowStep(0, tokens[-1], len(tokens) - 1)])[0]


def test_rows_with_different_adapters_answer_as_alone(bench: GpuBench, engine: Engine):
    a, b = random_adapter(SPEC, 1), random_adapter(SPEC, 2, rank=9, projections=("q", "up"))
    ha, hb = engine.add_adapter(a), engine.add_adapter(b)
    mixes = (
        ((), ()),
        ((MixEntry(ha, 1.0),), (Weighted(a),)),
        ((MixEntry(hb, 0.5),), (Weighted(b, 0.5),)),
        ((MixEntry(ha, 0.3), MixEntry(hb, 0.7)), (Weighted(a, 0.3), Weighted(b, 0.7))),
    )
    for row, (mix, _) in enumerate(mixes):
        engine.prefill(row, ids(PROMPT), 0, mix)
    logits = engine.decode([RowStep(r, 9, 8, mix) for r, (mix, _) in enumerate(mixes)])
    for row, (_, weighted) in enumerate(mixes):
        assert close(logits[row], bench.reference.logits([*PROMPT, 9], weighted))


def test_rows_with_dora_and_biases_answer_as_alone(around: GpuBench):
    """The same engine's rows, and each again once the first has left."""
    engine = around.open()
    kinds = [
        with_vectors(random_adapter(SPEC, 5), SPEC, 5, dora=True, bias=True),
        with_vectors(random_adapter(SPEC, 6, rank=9), SPEC, 6, bias=True),
        random_adapter(SPEC, 7, rank=2),
    ]
    handles = [engine.add_adapter(kind) for kind in kinds]
    rows = [((MixEntry(h, 1.0),), (Weighted(k),)) for h, k in zip(handles, kinds, strict=True)]
    plain = ((), ())

    def check(turn: list[tuple]) -> None:
        for row, (mix, _) in enumerate(turn):
            engine.prefill(row, ids(PROMPT), 0, mix)
        logits = engine.decode([RowStep(r, 9, 8, mix) for r, (mix, _) in enumerate(turn)])
        for row, (_, weighted) in enumerate(turn):
            assert close(logits[row], around.reference.logits([*PROMPT, 9], weighted))

    check([*rows, plain])
    check([plain, *rows[::-1]])
    engine.remove_adapter(handles[0])
    check([plain, plain, *rows[1:]])
    engine.close()


def test_adapters_may_be_swapped_while_another_row_decodes(bench: GpuBench, engine: Engine):
    kept = random_adapter(SPEC, 3)
    mix = (MixEntry(engine.add_adapter(kept), 1.0),)
    tokens = list(PROMPT)
    engine.prefill(1, ids(tokens), 0, mix)
    for i in range(12):
        other = engine.add_adapter(random_adapter(SPEC, 10 + i, rank=1 + 3 * i % 17))
        logits = engine.decode([RowStep(1, 30 + i, len(tokens), mix)])[0]
        tokens.append(30 + i)
        assert close(logits, bench.reference.logits(tokens, (Weighted(kept),)))
        engine.remove_adapter(other)


def test_rows_beside_a_step_keep_what_they_hold(bench: GpuBench, engine: Engine):
    full = [(7 * i) % SPEC.vocab for i in range(GRAPH.context)]
    engine.prefill(0, ids(full), 0)
    engine.prefill(1, ids(PROMPT), 0)
    held = [engine.read_kv(0, 0, len(full)), engine.read_kv(1, 0, 8)]
    engine.prefill(2, ids(PROMPT), 0)
    for i in range(4):
        engine.decode([RowStep(2, 40 + i, 8 + i)])
    assert np.array_equal(engine.read_kv(0, 0, len(full)).arrays[0], held[0].arrays[0])
    assert np.array_equal(engine.read_kv(1, 0, 8).arrays[0], held[1].arrays[0])


def test_shortlists_are_of_the_logits_that_a_step_returns(engine: Engine):
    """TopK, the sums and what is watched, as the device computes them."""
    for row in range(4):
        engine.prefill(row, np.array([row + 1, *PROMPT]), 0)
    steps = [RowStep(row, 9, len(PROMPT) + 1) for row in (2, 0, 3)]
    watches = [Watch(np.array(ids, np.int64), 0.7) for ids in ([], [5], [80, 2, 11])]
    logits = engine.decode(steps)
    for _ in range(2):  # captured, then replayed
        found = engine.decode_shortlist(steps, watches)
        for i, (all_, watch) in enumerate(zip(logits, watches, strict=True)):
            assert np.array_equal(engine.step_logits(i), all_)
            assert np.array_equal(found.logits[i], np.sort(all_)[::-1][: len(found.logits[i])])
            assert np.array_equal(all_[found.ids[i]], found.logits[i])
            assert np.array_equal(found.watched[i, : len(watch.ids)], all_[watch.ids])
            others = np.delete(all_, found.ids[i]).astype(np.float64) - all_.max()
            assert found.tail[i] == pytest.approx(np.exp(others).sum(), rel=1e-4)
            assert found.tail_at[i] == pytest.approx(np.exp(others / 0.7).sum(), rel=1e-4)


def test_a_prefix_copied_to_another_row_goes_on_with_the_same_bits(engine: Engine):
    engine.prefill(0, ids(PROMPT), 0)
    engine.write_kv(3, 0, engine.read_kv(0, 0, 8))
    logits = engine.decode([RowStep(0, 9, 8), RowStep(3, 9, 8)])
    assert np.array_equal(logits[0], logits[1])


def test_a_replayed_graph_gives_the_bits_of_a_step_enqueued_as_it_is(
    bench: GpuBench, monkeypatch: pytest.MonkeyPatch
):
    def answers() -> list[np.ndarray]:
        engine = bench.open()
        handle = engine.add_adapter(random_adapter(SPEC, 4))
        mix = (MixEntry(handle, 1.0),)
        for row in range(4):
            engine.prefill(row, ids(PROMPT), 0, mix)
        found = [
            engine.decode([RowStep(r, 50 + i, 8 + i, mix) for r in range(4)]) for i in range(8)
        ]
        engine.close()
        return found

    replayed = answers()

    def enqueued(self: StepGraphs, shape: StepShape) -> None:
        context = self._make(shape)
        self._step(context)
        self._cuda.synchronize(self._stream)

    monkeypatch.setattr(StepGraphs, "run", enqueued)
    for a, b in zip(replayed, answers(), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.slow
def test_thousands_of_steps_and_swaps_leave_memory_as_it_was(bench: GpuBench, engine: Engine):
    kinds = [random_adapter(SPEC, s, rank=4) for s in range(3)]

    def turn(i: int) -> None:
        handle = engine.add_adapter(kinds[i % 3])
        mix = (MixEntry(handle, 1.0),)
        engine.prefill(i % 4, ids(PROMPT), 0, mix)
        for step in range(10):
            engine.decode([RowStep(i % 4, step, 8 + step, mix)])
        engine.remove_adapter(handle)

    for i in range(8):
        turn(i)
    before, _ = bench.cuda.free_memory()
    for i in range(LEAK_STEPS // 10):
        turn(i)
    after, _ = bench.cuda.free_memory()
    assert before - after < LEAK_BYTES
