"""A TensorRT engine's shortlists on the emulated GPU: the numbers, the calls, whole answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from remora_agent.engine.protocol import Engine, RowStep, Watch
from remora_agent.engine.trt.sampling import PLAN
from remora_agent.runtime.api import SamplingParams
from remora_agent.runtime.model_runtime import ModelRuntime
from remora_contract.bundle import load_bundle
from remora_contract.errors import ArtifactInvalid, RequestInvalid, Unsupported
from tests.support import trt_engines
from tests.support.runtime import Listener, byte_text, request
from tests.support.shortlist_engine import shortlisted
from tests.support.trt_engines import WATCHED, Bench

KEPT = 16
NOTHING = Watch(np.zeros(0, np.int64))


@pytest.fixture(scope="module")
def short_gpu(trt_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("short") / "engine"
    return Bench(trt_bundle, trt_engines.build(trt_bundle, folder, shortlist=KEPT))


@pytest.fixture
def engine(short_gpu: Bench):
    engine = short_gpu.open()
    fill(engine)
    yield engine
    engine.close()


def fill(engine: Engine) -> None:
    for row in range(4):
        engine.prefill(row, np.array([row + 1, 2, 3], np.int64), 0)


def steps(*rows: int) -> list[RowStep]:
    return [RowStep(row, 7 + row, 3) for row in rows]


def check(found, logits, watches):
    wanted = shortlisted(logits, watches, KEPT)
    assert np.array_equal(found.logits, wanted.logits)
    assert np.array_equal(found.ids, wanted.ids)
    assert np.array_equal(found.tail, wanted.tail)
    assert np.array_equal(found.tail_at, wanted.tail_at)
    for row, watch, all_ in zip(found.watched, watches, logits, strict=True):
        assert np.array_equal(row[: len(watch.ids)], all_[watch.ids])


@pytest.mark.parametrize("rows", [(0,), (2,), (3, 1), (0, 1, 2, 3)])
def test_it_is_of_the_logits_that_decode_returns(engine: Engine, rows: tuple[int, ...]):
    ids = np.array([3, 50, 9], np.int64)
    for watches in (
        [Watch(np.roll(ids, r)[: r % 4], 0.5 + r) for r in rows],
        [NOTHING for _ in rows],
        [Watch(ids, 2.0) for _ in rows],
    ):
        logits = engine.decode(steps(*rows))
        found = engine.decode_shortlist(steps(*rows), watches)
        check(found, logits, watches)
        for i, all_ in enumerate(logits):
            assert np.array_equal(engine.step_logits(i), all_)
        assert np.array_equal(engine.decode(steps(*rows)), logits)


def test_a_step_is_one_launch_and_one_small_copy(short_gpu: Bench, engine: Engine):
    watching = [Watch(np.array([1], np.int64))] * 4

    def copied(watches: list[Watch]) -> tuple[list[str], int]:
        engine.decode_shortlist(steps(0, 1, 2, 3), watches)
        before = len(short_gpu.cuda.calls)
        engine.decode_shortlist(steps(0, 1, 2, 3), watches)
        calls = short_gpu.cuda.calls[before:]
        sizes = [call[4] * call[5] for call in calls if call[0] == "copy"]
        return [call[0] for call in calls], sizes[-1]

    kinds, read = copied([NOTHING] * 4)
    assert kinds == ["launch", "copy", "record", "synchronize"]
    assert read < 4 * (8 * KEPT + 8) + 4 * 256  # aligned
    kinds, more = copied(watching)
    assert kinds == ["copy", "launch", "copy", "record", "synchronize"]
    assert read < more < read + 4 * 4 * WATCHED + 256


def test_logits_are_read_back_of_the_last_shortlist_only(engine: Engine):
    engine.decode_shortlist(steps(0), [NOTHING])
    with pytest.raises(RequestInvalid, match="no such row"):
        engine.step_logits(1)
    engine.prefill(1, np.array([5], np.int64), 3)
    with pytest.raises(RequestInvalid, match="no such row"):
        engine.step_logits(0)


@pytest.mark.parametrize(
    "watch", [Watch(np.arange(WATCHED + 1)), Watch(np.array([-1])), Watch(np.array([1 << 20]))]
)
def test_what_cannot_be_watched_is_refused(engine: Engine, watch: Watch):
    with pytest.raises(RequestInvalid):
        engine.decode_shortlist(steps(0), [watch])
    with pytest.raises(RequestInvalid, match="one each"):
        engine.decode_shortlist(steps(0, 1), [NOTHING])


def test_an_engine_built_without_the_graph_makes_none(gpu: Bench):
    engine = gpu.open()
    fill(engine)
    assert engine.limits.shortlist == 0
    with pytest.raises(Unsupported, match="without its sampling graph"):
        engine.decode_shortlist(steps(0), [NOTHING])
    engine.close()


def test_everything_is_given_back(short_gpu: Bench):
    engine = short_gpu.open()
    fill(engine)
    live = len(short_gpu.cuda.live)
    engine.decode_shortlist(steps(0), [NOTHING])
    for _ in range(20):
        engine.decode_shortlist(steps(0), [NOTHING])
        engine.step_logits(0)
    assert len(short_gpu.cuda.live) == live + 1  # the CUDA graph
    engine.close()
    assert short_gpu.cuda.live == [] and short_gpu.trt.contexts == 0


def test_another_graph_in_its_place_is_refused(trt_bundle: Path, tmp_path: Path):
    entry = trt_engines.build(trt_bundle, tmp_path, shortlist=KEPT)
    (tmp_path / PLAN).write_bytes((tmp_path / "engine.plan").read_bytes())
    bench = Bench(trt_bundle, entry)
    with pytest.raises(ArtifactInvalid, match="other tensors than a sampling graph"):
        bench.open()
    assert bench.cuda.live == []


def test_answers_are_those_of_an_engine_without_shortlists(short_gpu: Bench, gpu: Bench):
    sampling = [
        SamplingParams(),
        SamplingParams(0.7, top_k=8, seed=1, repetition_penalty=1.2),
        SamplingParams(1.0, top_p=0.3, seed=2, presence_penalty=0.5),
        SamplingParams(1.0, seed=3),
    ]
    bundle = load_bundle(gpu.bundle_dir)

    def answers(bench: Bench) -> list[tuple[int, ...]]:
        runtime = ModelRuntime(bench.open(), bundle, byte_text())
        heard = [Listener() for _ in sampling]
        for i, (params, listener) in enumerate(zip(sampling, heard, strict=True)):
            runtime.submit(request(f"{i}", (1, 2 + i), 20, sampling=params), listener)
        tokens = [listener.wait().tokens for listener in heard]
        runtime.close()
        return tokens

    assert answers(short_gpu) == answers(gpu)
