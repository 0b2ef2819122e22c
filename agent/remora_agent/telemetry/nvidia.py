"""NVIDIA GPUs through NVML (`pip install remora[nvml]`), imported when opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from remora_agent.telemetry.source import Reading
from remora_contract.errors import Unavailable

INSTALL = "pip install 'remora[nvml]' and install NVIDIA's driver"


class NvmlSource:
    name = "nvml"

    def __init__(self) -> None:
        """Raises Unavailable without nvidia-ml-py, driver or GPU."""
        try:
            import pynvml
        except ImportError as e:
            raise Unavailable(f"nvidia-ml-py is not installed: {INSTALL}") from e
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
            self._devices = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
        except pynvml.NVMLError as e:
            raise Unavailable(f"NVML found no GPU ({e}): {INSTALL}") from e
        if not self._devices:
            raise Unavailable("NVML found no GPU in this machine")

    def read(self) -> Iterator[Reading]:
        watts = 0.0
        for i, device in enumerate(self._devices):
            for reading in self._device(device, f"gpu{i}"):
                watts += reading.value if reading.name == "rail_power_watts" else 0.0
                yield reading
        if watts:
            yield Reading("power_watts", watts)

    def close(self) -> None:
        self._nvml.nvmlShutdown()

    def _device(self, device: Any, label: str) -> Iterator[Reading]:
        n = self._nvml
        yield from self._ask(
            lambda: (Reading("gpu_load", n.nvmlDeviceGetUtilizationRates(device).gpu / 100, label),)
        )
        yield from self._ask(lambda: _memory(n.nvmlDeviceGetMemoryInfo(device), label))
        yield from self._ask(lambda: (_temperature(n, device, label),))
        yield from self._ask(
            lambda: (Reading("rail_power_watts", n.nvmlDeviceGetPowerUsage(device) / 1000, label),)
        )
        yield from self._ask(lambda: (_throttled(n, device, label),))

    def _ask(self, question: Callable[[], tuple[Reading, ...]]) -> tuple[Reading, ...]:
        """Nothing for what this GPU does not measure. Raises Unavailable when it is gone."""
        try:
            return question()
        except self._nvml.NVMLError_NotSupported:
            return ()
        except self._nvml.NVMLError as e:
            raise Unavailable(f"NVML: {e}") from e


def _memory(info: Any, label: str) -> tuple[Reading, ...]:
    return (
        Reading("gpu_memory_used_bytes", float(info.used), label),
        Reading("gpu_memory_total_bytes", float(info.total), label),
    )


def _temperature(n: Any, device: Any, label: str) -> Reading:
    celsius = n.nvmlDeviceGetTemperature(device, n.NVML_TEMPERATURE_GPU)
    return Reading("temperature_celsius", float(celsius), label)


def _throttled(n: Any, device: Any, label: str) -> Reading:
    """1 while heat or power slows the clocks (not while idle)."""
    reasons = n.nvmlDeviceGetCurrentClocksThrottleReasons(device)
    slowing = (
        n.nvmlClocksThrottleReasonSwPowerCap
        | n.nvmlClocksThrottleReasonHwSlowdown
        | n.nvmlClocksThrottleReasonSwThermalSlowdown
    )
    return Reading("gpu_throttled", 1.0 if reasons & slowing else 0.0, label)
