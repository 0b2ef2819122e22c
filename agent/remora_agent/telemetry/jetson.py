"""A Jetson board through jetson-stats: the `jtop` service reads the board, this client asks it.

jetson-stats is AGPL and optional (`pip install remora[jetson]`), so it is imported when opened and
nothing else depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from remora_agent.telemetry.source import Reading
from remora_contract.errors import Unavailable

INSTALL = "pip install 'remora[jetson]', then sudo systemctl enable --now jtop"


class JetsonSource:
    name = "jtop"

    def __init__(self, interval_s: float = 1.0) -> None:
        """Raises Unavailable when jetson-stats is not installed or its service does not answer."""
        try:
            import jtop
        except ImportError as e:
            raise Unavailable(f"jetson-stats is not installed: {INSTALL}") from e
        self._error: type[Exception] = jtop.JtopException
        try:
            self._jtop: Any = jtop.jtop(interval=interval_s)
            self._jtop.start()
        except (self._error, OSError) as e:
            why = " ".join(str(e).split())  # jtop's messages have several lines
            raise Unavailable(f"the jtop service does not answer ({why}): {INSTALL}") from e

    def read(self) -> Iterator[Reading]:
        try:
            if not self._jtop.ok(spin=True):
                raise Unavailable("the jtop service stopped: sudo systemctl restart jtop")
            yield from board_readings(
                self._jtop.gpu,
                self._jtop.temperature,
                self._jtop.power,
                self._jtop.memory,
                str(self._jtop.nvpmodel or ""),
            )
        except (self._error, OSError) as e:
            raise Unavailable(f"the jtop service went away: {e}") from e

    def close(self) -> None:
        self._jtop.close()


def board_readings(
    gpu: Mapping[str, Any],
    temperature: Mapping[str, Any],
    power: Mapping[str, Any],
    memory: Mapping[str, Any],
    nvpmodel: str,
) -> Iterator[Reading]:
    """jtop's dictionaries as readings. Milliwatts become watts, percent becomes 0..1, kB bytes."""
    for name, core in gpu.items():
        status = core.get("status", {})
        if "load" in status:
            yield Reading("gpu_load", float(status["load"]) / 100, name)
        frequency = core.get("freq", {})
        if frequency.get("cur"):
            yield Reading("gpu_frequency_hz", float(frequency["cur"]) * 1000, name)
    for name, sensor in temperature.items():
        if sensor.get("online", True):
            yield Reading("temperature_celsius", float(sensor["temp"]), name)
    yield from _power_readings(power)
    ram = memory.get("RAM", {})
    if "shared" in ram:
        yield Reading("gpu_memory_used_bytes", float(ram["shared"]) * 1024)
    if nvpmodel:
        yield Reading("power_mode_info", 1.0, nvpmodel.replace(" ", "_"))


def _power_readings(power: Mapping[str, Any]) -> Iterator[Reading]:
    for name, rail in power.get("rail", {}).items():
        if rail.get("online", True):
            yield Reading("rail_power_watts", float(rail["power"]) / 1000, name)
            yield Reading("rail_over_current", _over_limit(rail), name)
    total = power.get("tot", {})
    if "power" in total:
        yield Reading("power_watts", float(total["power"]) / 1000)


def _over_limit(rail: Mapping[str, Any]) -> float:
    """1 when the rail's current is above its warning limit: the board slows down for it."""
    warn = rail.get("warn")
    return 1.0 if warn and rail.get("curr", 0) > warn else 0.0
