"""CPU, memory, disk, temperatures and load of any Linux machine, through psutil."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

from remora_agent.control.facts import disk_free
from remora_agent.telemetry.source import Reading
from remora_contract.errors import Unavailable

# Governors write here when they slow a core down for heat (x86); absent elsewhere.
_THROTTLE_GLOB = "cpu[0-9]*/thermal_throttle/core_throttle_count"
_CPU_DIRECTORY = Path("/sys/devices/system/cpu")


class SystemSource:
    """CPU load is the mean since the previous `read`."""

    name = "psutil"

    def __init__(self, disk: Path, cpu_directory: Path = _CPU_DIRECTORY) -> None:
        """`disk` is any path on the state directory's file system."""
        self._disk, self._cpu_directory = disk, cpu_directory
        self._process = psutil.Process()
        psutil.cpu_percent()
        self._process.cpu_percent()

    def read(self) -> Iterator[Reading]:
        try:
            yield from self._read()
        except OSError as e:
            raise Unavailable(f"the system's measurements cannot be read: {e}") from e

    def _read(self) -> Iterator[Reading]:
        yield Reading("cpu_load", psutil.cpu_percent() / 100)
        memory = psutil.virtual_memory()
        yield Reading("memory_used_bytes", float(memory.total - memory.available))
        yield Reading("memory_total_bytes", float(memory.total))
        yield Reading("swap_used_bytes", float(psutil.swap_memory().used))
        yield Reading("disk_free_bytes", float(disk_free(self._disk)))
        yield Reading("agent_memory_bytes", float(self._process.memory_info().rss))
        yield Reading("agent_cpu_load", self._process.cpu_percent() / 100)
        yield from self._temperatures()
        yield from self._throttling()

    def close(self) -> None:
        return None

    def _temperatures(self) -> Iterator[Reading]:
        seen: set[str] = set()
        for chip, sensors in psutil.sensors_temperatures().items():
            for i, sensor in enumerate(sensors):
                label = sensor.label or (chip if i == 0 else f"{chip}_{i}")
                if label not in seen and sensor.current is not None:
                    seen.add(label)
                    yield Reading("temperature_celsius", float(sensor.current), label)

    def _throttling(self) -> Iterator[Reading]:
        counts = [int(p.read_text()) for p in self._cpu_directory.glob(_THROTTLE_GLOB)]
        if counts:
            yield Reading("cpu_throttle_events_total", float(sum(counts)))
