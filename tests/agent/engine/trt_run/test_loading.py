"""What keeps an engine from loading, said by name; and CUDA's errors as ours."""

from __future__ import annotations

import sys
from dataclasses import replace
from mmap import mmap
from pathlib import Path

import numpy as np
import pytest

from remora_agent.engine.cache import CacheEntry
from remora_agent.engine.trt import files, loading
from remora_agent.engine.trt.cuda import Cuda, load_bindings
from remora_agent.engine.trt.kv import KvShape
from remora_contract.bundle import load_bundle
from remora_contract.errors import (
    ArtifactInvalid,
    EngineFault,
    Exhausted,
    RequestInvalid,
    Unavailable,
    Unsupported,
)
from remora_contract.targets import GROUPS
from tests.agent.engine.portable import FLOAT32, QWEN2
from tests.support.cuda_emulator import CudaEmulator, cudaError_t
from tests.support.trt_engines import Bench, RunSize


def with_facts(gpu: Bench, **facts: str) -> Bench:
    manifest = gpu.entry.manifest
    changed = replace(manifest, facts={**manifest.facts, **facts})
    return Bench(gpu.bundle_dir, CacheEntry(gpu.entry.directory, changed))


def test_missing_bindings_say_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(Unsupported, match=r"pip install 'remora\[tensorrt\]'"):
        load_bindings()


def test_an_engine_of_another_backend_is_not_touched(gpu: Bench):
    manifest = gpu.entry.manifest
    recipe = replace(manifest.key.recipe, backend="onnxruntime")
    entry = replace(gpu.entry, manifest=replace(manifest, key=replace(manifest.key, recipe=recipe)))
    with pytest.raises(ArtifactInvalid, match="onnxruntime"):
        loading.load(entry, load_bundle(gpu.bundle_dir), RunSize())


@pytest.mark.parametrize("error", ["cudaErrorNoDevice", "cudaErrorInsufficientDriver"])
def test_no_gpu_and_no_driver_are_unavailable(gpu: Bench, error: str):
    none = CudaEmulator(devices=0)
    with pytest.raises(Unavailable, match="cudaErrorNoDevice"):
        Cuda(none).open_device()
    gpu.cuda.fail["cudaSetDevice"] = cudaError_t[error]
    with pytest.raises(Unavailable, match=error):
        gpu.open()
    assert gpu.cuda.live == []


def test_an_error_names_the_call_and_what_it_was_for():
    cuda = Cuda(CudaEmulator(memory=1000))
    with pytest.raises(Exhausted, match=r"cudaMalloc .*cudaErrorMemoryAllocation \(2000 bytes for"):
        cuda.allocate(2000, "a test")
    with pytest.raises(EngineFault, match="cudaFree failed with cudaErrorInvalidValue"):
        cuda.free(0x1000)


def test_a_plan_that_tensorrt_cannot_read_is_to_be_built_again(gpu: Bench, tmp_path: Path):
    (tmp_path / files.PLAN).write_bytes(b"\0" * 100)
    broken = Bench(gpu.bundle_dir, CacheEntry(tmp_path, gpu.entry.manifest))
    with pytest.raises(EngineFault, match="must be built again"):
        broken.open()
    for spoil in (lambda: (tmp_path / files.PLAN).write_bytes(b""), (tmp_path / files.PLAN).unlink):
        spoil()
        with pytest.raises(ArtifactInvalid, match="cannot be read"):
            broken.open()


def test_a_plan_is_never_copied_into_memory_of_our_own(gpu: Bench):
    gpu.open().close()
    assert gpu.trt.plans
    for plan in gpu.trt.plans:
        assert isinstance(plan, mmap)
        assert plan.closed


def test_more_rows_than_built_for_are_refused(gpu: Bench):
    with pytest.raises(RequestInvalid, match="built for 4 rows, not 5"):
        gpu.open(rows=5)
    engine = gpu.open(rows=3)
    assert engine.limits.rows == 3
    engine.close()


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        (files.FACT_CONTEXT, "47"),
        (files.FACT_PROFILES, '[{"kind":"prefill","rows":1,"tokens":5}]'),
        (
            files.FACT_PROFILES,
            '[{"kind":"prefill","rows":1,"tokens":9},{"kind":"decode","rows":4,"tokens":1}]',
        ),
    ],
)
def test_an_engine_that_is_not_as_its_facts_say_is_refused(gpu: Bench, fact: str, value: str):
    changed = with_facts(gpu, **{fact: value})
    with pytest.raises(ArtifactInvalid, match="build it again"):
        changed.open()
    assert changed.cuda.live == []


def test_a_graph_with_other_tensors_than_the_bundles_is_refused(gpu: Bench):
    bundle = load_bundle(gpu.bundle_dir)
    inputs, outputs = loading.expected_tensors(bundle)
    assert "lora_gate.qkv" in inputs and "present_value.1" in outputs
    fewer = replace(bundle, graph=replace(FLOAT32, max_bank_rank=0))
    assert not any(n.startswith("lora_") for n in loading.expected_tensors(fewer)[0])
    more = replace(bundle, graph=replace(bundle.graph, dora=True, adapter_bias=True))
    around = loading.expected_tensors(more)[0] - inputs
    assert around == {
        f"lora_{kind}.{layer}.{group}"
        for kind in ("scale", "bias")
        for layer in range(QWEN2.layers)
        for group in GROUPS
    }


def test_a_row_that_tensorrt_could_not_bind_is_refused():
    with pytest.raises(Unsupported, match="max-context"):
        KvShape.of(replace(QWEN2, kv_heads=1), 1, 47, np.dtype(np.float16))
