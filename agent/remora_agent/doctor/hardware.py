"""Checks of the machine: processor, memory, clock, sensors, and the backends it could run."""

from __future__ import annotations

import ctypes
import ctypes.util
import platform
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import psutil

from remora_agent.control.facts import device_model, installed_backends
from remora_agent.doctor.check import Check, fail, ok, warn
from remora_agent.edgellm import module as edgellm
from remora_agent.engine.trt.module import INSTALL, TRT_BACKENDS, TrtBackend, api_of
from remora_agent.engine.trt.target import this_gpu
from remora_agent.telemetry.jetson import JetsonSource
from remora_agent.telemetry.nvidia import NvmlSource
from remora_agent.telemetry.source import Source
from remora_contract.errors import RemoraError, Unavailable

GIB = 1 << 30
_MIN_ORT = (1, 23)
_LOW_MEMORY = 1 * GIB
# Instruction sets that int4 and int8 kernels want, best first.
_FEATURES = ("amx_int8", "avx512_vnni", "avx_vnni", "avx2", "asimddp", "asimd")
# No file of this program is older, so a clock before it has not been set.
_SANE_SINCE = datetime(2025, 1, 1, tzinfo=timezone.utc)


def hardware_checks() -> Iterator[Check]:
    yield check_processor(Path("/proc/cpuinfo"))
    yield check_memory(psutil.virtual_memory().total, psutil.virtual_memory().available)
    yield check_clock(time.time())
    yield check_onnxruntime(installed_backends())
    for backend in TRT_BACKENDS:
        yield check_tensorrt(backend, installed_backends())
    yield check_edgellm(installed_backends())
    yield check_cuda_driver()
    yield check_sensor("jtop", JetsonSource)
    yield check_sensor("nvml", NvmlSource)


def check_processor(cpuinfo: Path) -> Check:
    flags: set[str] = set()
    for line in cpuinfo.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags |= set(value.split())
    found = [f for f in _FEATURES if f in flags]
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    text = f"{device_model()}, {platform.machine()}, {cores} cores, {', '.join(found) or 'none'}"
    if not found:
        return warn("processor", text, "no SIMD extension for int8: decoding will be slow")
    return ok("processor", text)


def check_memory(total: int, available: int) -> Check:
    text = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    if available < _LOW_MEMORY:
        return warn("memory", text, "end other programs, or serve a smaller or int4 bundle")
    return ok("memory", text)


def check_clock(unix_s: float) -> Check:
    """Certificates are only valid in their time: an unset clock looks like a broken identity."""
    now = datetime.fromtimestamp(unix_s, tz=timezone.utc)
    if now < _SANE_SINCE:
        return fail("clock", f"{now:%Y-%m-%d %H:%M} UTC", "set the clock: timedatectl set-ntp true")
    return ok("clock", f"{now:%Y-%m-%d %H:%M} UTC")


def check_onnxruntime(backends: dict[str, str]) -> Check:
    version = backends.get("onnxruntime")
    if version is None:
        return fail("onnxruntime", "not installed", "pip install 'remora[agent]'")
    if tuple(int(p) for p in version.split(".")[:2]) < _MIN_ORT:
        return fail("onnxruntime", version, "pip install --upgrade 'onnxruntime>=1.23.2'")
    try:
        import onnxruntime
    except ImportError as e:
        return fail("onnxruntime", f"{version} does not load: {e}", "reinstall onnxruntime")
    providers = ", ".join(
        p.removesuffix("ExecutionProvider") for p in onnxruntime.get_available_providers()
    )
    return ok("onnxruntime", f"{version} ({providers})")


def check_tensorrt(backend: TrtBackend, backends: dict[str, str]) -> Check:
    version = backends.get(backend)
    if version is None:
        return warn(backend, "not installed", INSTALL[backend])
    try:
        api_of(backend, version)
        gpu = this_gpu(backend)
    except RemoraError as e:
        return warn(backend, f"{version} installed", str(e))
    return ok(
        backend, f"{version} on {gpu.name} (SM {gpu.processor}); serve with --backend {backend}"
    )


def check_edgellm(backends: dict[str, str]) -> Check:
    """Whether it runs here is known once its runtime is opened, in a process of its own."""
    version = backends.get(edgellm.BACKEND)
    if version is None:
        return warn(edgellm.BACKEND, "not installed", edgellm.INSTALL)
    return ok(edgellm.BACKEND, f"{version} installed; serve with --backend {edgellm.BACKEND}")


def check_cuda_driver() -> Check:
    """Asks libcuda itself: what nvidia-smi prints may be another installation's."""
    name = ctypes.util.find_library("cuda") or "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return warn("cuda driver", "none", "without a GPU there is nothing to do")
    version = ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return warn("cuda driver", "does not answer", "check dmesg and nvidia-smi")
    return ok("cuda driver", f"CUDA {version.value // 1000}.{version.value % 1000 // 10}")


def check_sensor(name: str, open_source: Callable[[], Source]) -> Check:
    try:
        source = open_source()
    except Unavailable as e:
        return warn(name, "not available", str(e))
    try:
        return ok(name, f"{len(list(source.read()))} readings")
    except Unavailable as e:
        return warn(name, "does not answer", str(e))
    finally:
        source.close()
