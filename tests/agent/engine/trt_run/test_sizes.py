"""What is estimated before an engine is there is what it then takes; what does not fit is refused
before anything is allocated, with every part named."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from remora_agent.engine.cache import CacheEntry
from remora_agent.engine.trt import loading
from remora_contract.bundle import load_bundle
from remora_contract.errors import Exhausted, Unsupported
from remora_contract.trt_memory import SamplingSize, TrtSizes
from tests.agent.engine.portable import FLOAT16, FLOAT32, QWEN2, random_bundle
from tests.support import trt_engines
from tests.support.cuda_emulator import CudaEmulator
from tests.support.trt_emulator import SCRATCH
from tests.support.trt_engines import CHUNK, Bench

ROWS = 3
NO_SHORTLISTS = SamplingSize(QWEN2.vocab, 160, 1024).pinned_bytes(ROWS)  # built without
STEP_INPUTS = 64 << 10  # tokens, positions, gates of this model, each piece rounded up


def test_the_estimate_is_what_is_allocated(gpu: Bench):
    engine = gpu.open(rows=ROWS)
    sizes = TrtSizes.of(load_bundle(gpu.bundle_dir))
    more = sizes.overlap_bytes(ROWS, CHUNK, SCRATCH)
    plan = sizes.memory_plan(ROWS, 0, SCRATCH, CHUNK, overlap=more)
    estimated = plan.total - plan.floor
    assert estimated <= gpu.cuda.used <= estimated + STEP_INPUTS
    pinned = sizes.pinned_bytes(ROWS, CHUNK, overlaps=True)
    assert pinned - NO_SHORTLISTS - STEP_INPUTS <= gpu.cuda.pinned <= pinned
    engine.close()


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("max_bank_rank", [0, 256])
def test_pinned_memory_is_what_is_estimated(tmp_path: Path, rows: int, max_bank_rank: int):
    directory = random_bundle(tmp_path / "b", QWEN2, replace(FLOAT32, max_bank_rank=max_bank_rank))
    entry = trt_engines.build(directory, tmp_path / "engine", rows=rows, shortlist=40)
    bench, sizes = Bench(directory, entry), TrtSizes.of(load_bundle(directory))
    engine = bench.open(rows=rows)
    size = SamplingSize(QWEN2.vocab, 40, trt_engines.WATCHED)
    overlaps = rows > 1
    estimated = sizes.pinned_bytes(rows, CHUNK, size, overlaps=overlaps)
    assert estimated - (16 << 10) <= bench.cuda.pinned <= estimated
    engine.close()


def test_pinned_memory_is_named_where_it_is_the_gpus_and_left_out_where_it_is_not(
    trt_bundle: Path, trt_entry: CacheEntry, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loading, "_of_system", lambda: 1 << 20)
    pinned = TrtSizes.of(load_bundle(trt_bundle)).pinned_bytes(4, CHUNK)
    assert 4 << 20 < pinned < 5 << 20
    for is_shared in (True, False):
        bench = Bench(trt_bundle, trt_entry, CudaEmulator(1 << 20, is_shared=is_shared))
        with pytest.raises(Exhausted) as refused:
            bench.open()
        assert ("pinned 5 MiB" in str(refused.value)) == is_shared


def test_where_a_second_context_does_not_fit_prompts_are_read_alone(
    trt_bundle: Path,
    trt_entry: CacheEntry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(loading, "_of_system", lambda: 0)
    sizes = TrtSizes.of(load_bundle(trt_bundle))
    plan = sizes.memory_plan(4, weights=0, workspace=SCRATCH, chunk=CHUNK)
    more = sizes.overlap_bytes(4, CHUNK, SCRATCH)
    assert more > SCRATCH
    for free, overlaps in ((plan.total + more, True), (plan.total + more - 1, False)):
        bench = Bench(trt_bundle, trt_entry, CudaEmulator(free, is_shared=False))
        with caplog.at_level(logging.INFO):
            engine = bench.open()
        assert engine.limits.overlaps == overlaps
        assert ("engine.prompts_alone" in caplog.messages) != overlaps
        engine.close()


def test_the_switch_and_a_single_row_take_no_second_context(gpu: Bench):
    for changes in ({"overlap": "off"}, {"rows": 1}):
        engine = gpu.open(**changes)
        assert not engine.limits.overlaps
        with pytest.raises(Unsupported, match="beside decode steps"):
            engine.begin_prefill(0, np.array([1], np.int64), 0)
        assert gpu.cuda.live.count("Stream") == 2
        engine.close()


def test_each_row_costs_its_cache_and_its_logits(gpu: Bench):
    used = []
    for rows in (1, 2):
        engine = gpu.open(rows=rows)
        used.append(gpu.cuda.used)
        engine.close()
    bundle = load_bundle(gpu.bundle_dir)
    row = TrtSizes.of(bundle).cache_bytes(1) + 4 * bundle.decoder.vocab
    assert row <= used[1] - used[0] <= row + STEP_INPUTS


def test_the_bank_is_wider_than_its_adapters(trt_bundle: Path):
    """By hand: one group, gate_up of hidden 64 and 96 + 96 outputs, rank 8 in float16: 16 columns
    in A [64, 16] and B [16, 192], and once more A."""
    bundle = replace(load_bundle(trt_bundle), graph=replace(FLOAT16, max_bank_rank=8))
    whole, twice = (
        TrtSizes.of(replace(bundle, decoder=replace(QWEN2, layers=layers))).bank
        for layers in (1, 2)
    )
    layer = sum(
        8 * parts * (k + n)
        for parts, k, n in ((3, 64, 128), (1, 64, 64), (2, 64, 192), (1, 96, 64))
    )
    assert twice - whole == 2 * layer
    assert whole == 2 * (layer + 3 * 8 * 64)


@pytest.mark.parametrize("is_shared", [True, False])
def test_what_does_not_fit_is_refused_by_parts_before_anything_is_allocated(
    trt_bundle: Path, trt_entry: CacheEntry, is_shared: bool
):
    """Where memory is the system's, what the kernel would give back counts too: here there is
    enough, and CUDA alone would have said that there is not."""
    plan = TrtSizes.of(load_bundle(trt_bundle)).memory_plan(4, weights=0, workspace=0)
    cuda = CudaEmulator(plan.total - plan.floor + STEP_INPUTS, is_shared=is_shared)
    bench = Bench(trt_bundle, trt_entry, cuda)
    if is_shared:
        bench.open().close()
        return
    with pytest.raises(Exhausted, match=r"kv .*bank .*logits .*floor 512 MiB.*free"):
        bench.open()
    assert cuda.live == []
    assert not any(call[0] == "cudaMalloc" for call in cuda.calls)
