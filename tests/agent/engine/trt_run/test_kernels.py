"""What TensorRT for RTX compiles at load is kept for the next start: bounded, verified, never in
the way. TensorRT's cache is emulated: what it holds and when it grows cannot be seen here."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from remora_agent.engine.cache import CacheEntry, EngineCache
from remora_agent.engine.protocol import Engine, RowStep
from remora_agent.engine.trt import kernels
from tests.support import trt_engines
from tests.support.trt_engines import Bench

PROMPT = np.array([3, 4, 5, 6], np.int64)
MODEL, SHORTLISTS = "built.onnx", "sampling.onnx"


@pytest.fixture
def start(trt_bundle: Path, tmp_path: Path) -> Callable[[], Bench]:
    """A process that starts with the engine on disk: a module and GPU of its own."""
    entry = trt_engines.build(trt_bundle, tmp_path / "engine", shortlist=16)
    return lambda: Bench(trt_bundle, entry, backend="tensorrt_rtx")


def used(engine: Engine) -> np.ndarray:
    """After a prompt, a step and the end."""
    engine.prefill(0, PROMPT, 0)
    logits = engine.decode([RowStep(0, 9, len(PROMPT))]).copy()
    engine.close()
    return logits


def test_a_second_start_compiles_nothing(start: Callable[[], Bench]):
    first, second = start(), start()
    wanted = used(first.open())
    assert set(first.trt.compiled) == {MODEL, SHORTLISTS}
    assert np.array_equal(used(second.open()), wanted)
    assert second.trt.compiled == []
    assert first.cuda.live == second.cuda.live == []


def test_what_is_compiled_at_load_is_kept_though_the_process_is_killed(
    start: Callable[[], Bench],
):
    start().open()  # and never closed
    second = start()
    used(second.open())
    assert second.trt.compiled == [SHORTLISTS]  # of the first step


@pytest.mark.parametrize("spoil", ["a flipped bit", "cut", "empty", "too large"])
def test_a_damaged_file_does_not_reach_tensorrt_and_is_replaced(
    start: Callable[[], Bench],
    spoil: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    first, second, third = start(), start(), start()
    used(first.open())
    path = first.entry.kernels
    good = path.read_bytes()
    if spoil == "too large":
        monkeypatch.setattr(kernels, "MAX_BYTES", len(good))
        more = good[32:] + b" " * 100
        path.write_bytes(hashlib.sha256(more).digest() + more)
    elif spoil == "a flipped bit":
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    else:
        path.write_bytes(good[: len(good) // 2 if spoil == "cut" else 0])
    used(second.open())
    assert "engine.kernels_refused" in caplog.messages
    assert second.trt.deserialized == [] and set(second.trt.compiled) == {MODEL, SHORTLISTS}
    monkeypatch.undo()
    used(third.open())
    assert third.trt.compiled == [] and path.read_bytes() == good


def test_kernels_of_another_gpu_are_refused_and_compiled_anew(
    start: Callable[[], Bench], caplog: pytest.LogCaptureFixture
):
    first, other, again = start(), start(), start()
    used(first.open())
    other.trt.environment = again.trt.environment = "1.7.1 on another GPU"
    used(other.open())
    assert "engine.kernels_refused" in caplog.messages and MODEL in other.trt.compiled
    used(again.open())
    assert again.trt.compiled == []


def test_more_than_the_bound_is_not_written(
    start: Callable[[], Bench], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(kernels, "MAX_BYTES", 8)
    bench = start()
    used(bench.open())
    assert "engine.kernels_too_large" in caplog.messages and not bench.entry.kernels.exists()


def test_an_engine_serves_where_its_kernels_cannot_be_written(
    start: Callable[[], Bench], caplog: pytest.LogCaptureFixture
):
    bench = start()
    bench.entry.kernels.with_name(f"{bench.entry.kernels.name}.partial").mkdir()
    used(bench.open())
    assert "engine.kernels_not_kept" in caplog.messages and bench.cuda.live == []


def test_tensorrt_itself_keeps_no_kernels(trt_bundle: Path, trt_entry: CacheEntry):
    used(Bench(trt_bundle, trt_entry).open())
    assert not trt_entry.kernels.exists()


def test_kernels_count_and_go_with_their_engine(trt_bundle: Path, tmp_path: Path):
    cache, key = EngineCache(tmp_path, 1 << 30), "sha256:" + hashlib.sha256(b"key").hexdigest()
    directory = tmp_path / key.removeprefix("sha256:")
    directory.mkdir()
    entry = CacheEntry(directory, trt_engines.build(trt_bundle, tmp_path / "engine").manifest)
    entry.kernels.write_bytes(b"k" * 1000)
    assert [s.bytes for s in cache.stored()] == [1000]
    cache.remove(key)
    assert not entry.kernels.exists()


def test_kernels_of_an_engine_that_is_gone_are_removed_at_the_next_start(tmp_path: Path):
    EngineCache(tmp_path, 1 << 30)
    kept, gone = (tmp_path / hashlib.sha256(name).hexdigest() for name in (b"kept", b"gone"))
    for directory in (kept, gone):
        directory.mkdir()
        CacheEntry(directory, None).kernels.write_bytes(b"kernels")
    shutil.rmtree(gone)
    EngineCache(tmp_path, 1 << 30)
    assert [p.name for p in tmp_path.glob("*.kernels")] == [f"{kept.name}.kernels"]
