"""The table of API differences against the module that is installed here, and its refusals."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType

import pytest

from remora_agent.engine.trt.builder import set_flags
from remora_agent.engine.trt.module import APIS, TRT_BACKENDS, TrtModule, api_of, load_module
from remora_contract.dialects import SUPPORT
from remora_contract.errors import Unsupported

needs_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx is not installed: pip install 'remora[tensorrt]'",
)


@pytest.fixture(scope="module")
def rtx() -> TrtModule:
    return load_module("tensorrt_rtx")


@needs_rtx
def test_the_table_names_every_processor_that_tensorrt_rtx_builds_for(rtx: TrtModule):
    names = [n for n in rtx.trt.ComputeCapability.__members__ if n.startswith("SM")]
    assert sorted(rtx.api.targets) == sorted(int(n.removeprefix("SM")) for n in names)


@needs_rtx
def test_what_the_table_says_of_tensorrt_rtx_is_there(rtx: TrtModule):
    trt, api = rtx.trt, rtx.api
    assert (api.strong_typing == "flag") == hasattr(
        trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"
    )
    assert bool(api.targets) == hasattr(trt.IBuilderConfig, "set_compute_capability")
    assert api.runtime_cache == hasattr(trt.IRuntimeConfig, "create_runtime_cache")
    assert api.aliased_outputs == hasattr(trt.ICudaEngine, "get_aliased_input_tensor")
    assert api.user_allocation == hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION")


@needs_rtx
@pytest.mark.parametrize(
    "name",
    [
        "ICudaEngine.create_runtime_config",
        "IRuntimeConfig.set_execution_context_allocation_strategy",
        "IRuntimeConfig.create_runtime_cache",
        "IRuntimeConfig.set_runtime_cache",
        "IRuntimeCache.serialize",
        "IRuntimeCache.deserialize",
    ],
)
def test_the_runtime_cache_is_used_by_names_that_are_there(rtx: TrtModule, name: str):
    owner, _, attribute = name.partition(".")
    assert hasattr(getattr(rtx.trt, owner), attribute)


@needs_rtx
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_layers_take_no_memory_of_their_own_and_float32_stays_exact(rtx: TrtModule, dtype: str):
    trt = rtx.trt
    config = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_builder_config()
    set_flags(rtx, config, dtype)
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    assert config.get_flag(trt.BuilderFlag.TF32) == (dtype == "float16")


@needs_rtx
@pytest.mark.parametrize(
    "name",
    [
        "IBuilderConfig.progress_monitor",
        "IBuilderConfig.set_memory_pool_limit",
        "IBuilderConfig.profiling_verbosity",
        "IBuilderConfig.add_optimization_profile",
        "MemoryPoolType.WORKSPACE",
        "ICudaEngine.device_memory_size_v2",
        "ICudaEngine.get_device_memory_size_for_profile_v2",
        "ICudaEngine.create_engine_inspector",
        "IExecutionContext.set_optimization_profile_async",
        "IExecutionContext.execute_async_v3",
        "IExecutionContext.set_tensor_address",
        "IExecutionContext.set_input_shape",
        "OnnxParser.parse",
    ],
)
def test_what_all_modules_share_is_there(rtx: TrtModule, name: str):
    owner, _, attribute = name.partition(".")
    assert hasattr(getattr(rtx.trt, owner), attribute)


def test_every_backend_that_takes_a_dialect_has_a_row_at_that_version():
    for row in SUPPORT:
        if row.backend in TRT_BACKENDS:
            assert api_of(row.backend, row.version).since <= row.since


@pytest.mark.parametrize(
    ("backend", "version", "since"),
    [
        ("tensorrt", "10.3.0.30", (10, 3)),
        ("tensorrt", "10.16.1.11", (10, 15)),
        ("tensorrt", "11.4.1", (11, 0)),
        ("tensorrt_rtx", "1.7.1.116", (1, 7)),
    ],
)
def test_a_version_gets_the_newest_row_that_is_not_newer(backend, version, since):
    assert api_of(backend, version).since == since


def test_a_version_before_the_table_is_refused():
    with pytest.raises(Unsupported, match=r"tensorrt 8\.6\.2 is older than 10\.3"):
        api_of("tensorrt", "8.6.2")


def test_a_module_that_is_not_installed_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(Unsupported, match=r"tensorrt cannot be imported.*JetPack.*pip install"):
        load_module("tensorrt")


def test_a_module_of_the_table_is_loaded_with_its_row(monkeypatch):
    stand_in = ModuleType("tensorrt")
    stand_in.__version__ = "10.3.0"
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in)
    loaded = load_module("tensorrt")
    assert loaded.trt is stand_in and loaded.api in APIS and loaded.api.timing_cache
