"""Which sources a device has, in order of preference: the first to give a name wins.

Jetson boards answer through jtop; NVML knows discrete GPUs; psutil knows every machine.
"""

from __future__ import annotations

from pathlib import Path

from remora_agent.telemetry.jetson import JetsonSource
from remora_agent.telemetry.nvidia import NvmlSource
from remora_agent.telemetry.sampler import Opener
from remora_agent.telemetry.system import SystemSource


def device_openers(disk: Path) -> list[Opener]:
    """`disk` is any path on the state directory's file system."""
    return [
        Opener("jtop", JetsonSource),
        Opener("nvml", NvmlSource),
        Opener("psutil", lambda: SystemSource(disk)),
    ]
