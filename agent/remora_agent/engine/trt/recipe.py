"""The build key's TensorRT half: which engine this machine, or another one, wants of a bundle."""

from __future__ import annotations

import platform
from dataclasses import replace

from remora_agent.engine.recipe import GpuBuild, Machine, Recipe
from remora_agent.engine.trt.module import TrtBackend, TrtModule, load_module
from remora_agent.engine.trt.profiles import profiles_of
from remora_agent.engine.trt.target import Gpu, check_processors, this_gpu
from remora_contract.bundle import Bundle
from remora_contract.engine import flat
from remora_contract.trt_memory import GpuMemory, TrtSizes, build_plan

BUILDER_VERSION = 4  # rises when the same graph is built differently


def recipe(
    backend: TrtBackend, bundle: Bundle, rows: int, context: int, processors: tuple[int, ...] = ()
) -> Recipe:
    """What to build; without `processors` for this machine's GPU.

    Raises Unsupported (module missing, too old, or bound to its machine), Refused (no GPU),
    Exhausted (the GPU is too small), RequestInvalid.
    """
    module = load_module(backend)
    if processors:
        gpu = None
        processors = check_processors(module, processors)
    else:
        gpu = this_gpu(backend)
        processors = (gpu.processor,)
    prefill, decode = profiles_of(rows, context)
    build = GpuBuild(processors, decode.rows, prefill.tokens)
    if gpu is not None and not module.api.portable:
        build = _bound(build, gpu, bundle)
    return _recipe(module, build)


def device_fields(backend: TrtBackend, rows: int) -> tuple[dict[str, str], GpuMemory]:
    """What of every recipe here is known before there is a bundle, as `remora_contract.engine.flat`
    writes it, and the GPU's memory. Raises as `recipe` does."""
    module, gpu = load_module(backend), this_gpu(backend)
    build = GpuBuild((gpu.processor,), rows, prefill_tokens=1)
    if not module.api.portable:
        build = replace(build, device=gpu.name, driver=gpu.driver, power_mode=gpu.power_mode)
    fields = flat(_recipe(module, build))
    del fields["gpu.prefill_tokens"]  # a context may be shorter than a chunk
    return fields, gpu.memory


def _recipe(module: TrtModule, build: GpuBuild) -> Recipe:
    # No instruction sets: the processor beside the GPU runs no kernel of the engine.
    machine = Machine(platform.machine(), "")
    return Recipe(module.backend, module.version, BUILDER_VERSION, 0, machine, gpu=build)


def _bound(build: GpuBuild, gpu: Gpu, bundle: Bundle) -> GpuBuild:
    """To the GPU whose kernels are measured while it is built."""
    plan = build_plan(TrtSizes.of(bundle), build.rows, build.prefill_tokens, gpu.memory)
    return replace(
        build,
        device=gpu.name,
        driver=gpu.driver,
        power_mode=gpu.power_mode,
        workspace_bytes=plan.workspace,
    )
