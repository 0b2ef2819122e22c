"""The emulator sees the mistakes that it is there for."""

from __future__ import annotations

import numpy as np
import pytest

from remora_agent.engine.protocol import MixEntry
from remora_agent.engine.trt import bank
from remora_agent.engine.trt.cuda import Cuda
from remora_contract.errors import EngineFault
from tests.agent.engine.portable import QWEN2, Reference, Weighted, random_adapter
from tests.support.cuda_emulator import CudaEmulator
from tests.support.trt_engines import Bench

PROMPT = [3, 4, 5]


def test_a_step_that_does_not_wait_for_the_banks_writes_answers_wrongly(
    gpu: Bench, reference: Reference, monkeypatch: pytest.MonkeyPatch
):
    engine = gpu.open()
    monkeypatch.setattr(Cuda, "wait", lambda *_: None)
    gpu.cuda.order.strict = False
    a = random_adapter(QWEN2, 1)
    mix = (MixEntry(engine.add_adapter(a), 1.0),)
    logits = engine.prefill(0, np.array(PROMPT, np.int64), 0, mix)
    assert not np.abs(logits - reference.logits(PROMPT, (Weighted(a),))).max() < 1e-2
    monkeypatch.undo()
    engine.close()


def test_and_is_told_what_may_run_at_the_same_time(gpu: Bench, monkeypatch: pytest.MonkeyPatch):
    engine = gpu.open()
    monkeypatch.setattr(Cuda, "wait", lambda *_: None)
    mix = (MixEntry(engine.add_adapter(random_adapter(QWEN2, 1)), 1.0),)
    with pytest.raises(AssertionError, match="and a run of profile 0 may run at the same"):
        engine.prefill(0, np.array(PROMPT, np.int64), 0, mix)
    monkeypatch.undo()
    gpu.cuda.order.strict = False
    engine.close()


def test_staging_memory_written_before_its_copy_ran_is_seen(
    gpu: Bench, reference: Reference, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bank, "STAGED_BYTES", 1)
    engine = gpu.open()
    a = random_adapter(QWEN2, 1)
    monkeypatch.setattr(Cuda, "synchronize", lambda *_: None)
    mix = (MixEntry(engine.add_adapter(a), 1.0),)
    monkeypatch.undo()
    logits = engine.prefill(0, np.array(PROMPT, np.int64), 0, mix)
    assert not np.abs(logits - reference.logits(PROMPT, (Weighted(a),))).max() < 1e-2
    engine.close()


def test_memory_freed_before_its_copy_ran_is_seen():
    emulator = CudaEmulator()
    cuda = Cuda(emulator)
    stream, device = cuda.make_stream(), cuda.allocate(64, "a test")
    cuda.clear(device, 64, stream)
    cuda.free(device)
    with pytest.raises(AssertionError, match="outside what is allocated"):
        cuda.synchronize(stream)


def test_waiting_inside_a_capture_spoils_it():
    cuda = Cuda(CudaEmulator())
    stream = cuda.make_stream()
    cuda.begin_capture(stream)
    with pytest.raises(EngineFault, match="StreamCaptureUnsupported"):
        cuda.synchronize(stream)
    with pytest.raises(EngineFault, match="Invalidated"):
        cuda.end_capture(stream)


def test_a_graph_replays_the_addresses_of_its_capture():
    emulator = CudaEmulator()
    cuda = Cuda(emulator)
    stream = cuda.make_stream()
    device, host = cuda.allocate(8, "a test"), cuda.allocate_pinned(8, "a test")
    cuda.begin_capture(stream)
    cuda.copy(device, host, 8, "to_device", stream)
    graph = cuda.end_capture(stream)
    cuda.synchronize(stream)
    assert emulator.view(device, 8, "a test")[0] == 0xFF  # captured, not run
    for value in (1, 2):
        emulator.view(host, 8, "a test")[...] = value
        cuda.launch(graph, stream)
        cuda.synchronize(stream)
        assert (emulator.view(device, 8, "a test") == value).all()


def test_pageable_memory_is_no_end_of_a_copy():
    cuda = Cuda(CudaEmulator())
    array = np.zeros(8, np.uint8)
    stream, device = cuda.make_stream(), cuda.allocate(8, "a test")
    with pytest.raises(AssertionError, match="source"):
        cuda.copy(device, array.ctypes.data, 8, "to_device", stream)
