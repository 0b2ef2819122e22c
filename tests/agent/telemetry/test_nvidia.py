"""NVML through a library that answers as NVIDIA's does, since the real one needs its driver."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from remora_agent.telemetry.nvidia import NvmlSource
from remora_contract.errors import Unavailable


class FakeNvml(ModuleType):
    NVML_TEMPERATURE_GPU = 0
    nvmlClocksThrottleReasonSwPowerCap = 4
    nvmlClocksThrottleReasonHwSlowdown = 8
    nvmlClocksThrottleReasonSwThermalSlowdown = 32

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    def __init__(self, gpus: int = 1) -> None:
        super().__init__("pynvml")
        self.gpus, self.reasons, self.gone, self.has_power = gpus, 1, False, True

    def nvmlInit(self):
        if self.gpus == 0:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlShutdown(self):
        self.gone = True

    def nvmlDeviceGetCount(self):
        return self.gpus

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetUtilizationRates(self, device):
        if self.gone:
            raise self.NVMLError("GPU is lost")
        return SimpleNamespace(gpu=50)

    def nvmlDeviceGetMemoryInfo(self, device):
        return SimpleNamespace(used=1024, total=4096)

    def nvmlDeviceGetTemperature(self, device, kind):
        return 60

    def nvmlDeviceGetPowerUsage(self, device):
        if not self.has_power:
            raise self.NVMLError_NotSupported("Not Supported")
        return 30_000

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, device):
        return self.reasons


@pytest.fixture
def nvml(monkeypatch):
    made = FakeNvml(gpus=2)
    monkeypatch.setitem(sys.modules, "pynvml", made)
    return made


def read(source: NvmlSource) -> dict[str, float]:
    return {r.wire_name: r.value for r in source.read()}


def test_every_gpu_is_read_and_their_power_summed(nvml):
    found = read(NvmlSource())
    assert found["gpu_load.gpu0"] == 0.5
    assert found["gpu_memory_total_bytes.gpu1"] == 4096
    assert found["power_watts"] == 60.0
    assert found["gpu_throttled.gpu0"] == 0.0, "idle clocks are no throttling"


def test_heat_that_slows_the_clocks_shows(nvml):
    nvml.reasons = nvml.nvmlClocksThrottleReasonSwThermalSlowdown
    assert read(NvmlSource())["gpu_throttled.gpu1"] == 1.0


def test_what_a_gpu_does_not_measure_is_left_out(nvml):
    nvml.has_power = False
    found = read(NvmlSource())
    assert "power_watts" not in found and found["temperature_celsius.gpu0"] == 60.0


def test_a_lost_gpu_is_unavailable(nvml):
    source = NvmlSource()
    nvml.gone = True
    with pytest.raises(Unavailable, match="GPU is lost"):
        read(source)


def test_no_driver_is_unavailable_with_the_next_step(nvml):
    nvml.gpus = 0
    with pytest.raises(Unavailable, match="install NVIDIA's driver"):
        NvmlSource()
