"""A TensorRT engine's folder, and emulated GPUs to run it on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from remora_agent.engine.cache import CacheEntry
from tests.agent.engine.portable import FLOAT16, QWEN2, Reference, random_bundle
from tests.support import trt_engines
from tests.support.cuda_emulator import CudaEmulator
from tests.support.trt_engines import Bench


@pytest.fixture(scope="session")
def trt_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_bundle(tmp_path_factory.mktemp("trt") / "bundle")


@pytest.fixture(scope="session")
def reference(trt_bundle: Path) -> Reference:
    return Reference(trt_bundle)


@pytest.fixture(scope="session")
def trt_entry(trt_bundle: Path) -> CacheEntry:
    return trt_engines.build(trt_bundle, trt_bundle.parent / "engine")


@pytest.fixture
def gpu(trt_bundle: Path, trt_entry: CacheEntry) -> Bench:
    return Bench(trt_bundle, trt_entry)


@pytest.fixture
def make_gpu(trt_bundle: Path, trt_entry: CacheEntry) -> Callable[[int], Bench]:
    def make(memory: int) -> Bench:
        return Bench(trt_bundle, trt_entry, CudaEmulator(memory))

    return make


@pytest.fixture(scope="session")
def half_gpu(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    directory = random_bundle(tmp_path_factory.mktemp("trt16") / "bundle", QWEN2, FLOAT16)
    return Bench(directory, trt_engines.build(directory, directory.parent / "engine"))
