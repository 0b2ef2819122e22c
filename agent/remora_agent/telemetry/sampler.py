"""One sample of everything: sources, serving metrics, energy. Keeps the latest for /metrics.

A source that fails is closed, logged and opened again later; the others go on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from remora_agent.telemetry.energy import Energy, joules_per_token
from remora_agent.telemetry.serving import TOKENS, serving_readings
from remora_agent.telemetry.source import Reading, Source
from remora_contract.errors import Unavailable

log = logging.getLogger(__name__)
_REOPEN_AFTER_S = 300.0


@dataclass(frozen=True)
class Opener:
    """How to open a source, again and again. `open` raises Unavailable saying what is missing."""

    name: str
    open: Callable[[], Source]


@dataclass
class _Slot:
    opener: Opener
    source: Source | None = None
    retry_at_s: float = 0.0
    why_absent: str = ""


class Sampler:
    def __init__(
        self,
        openers: Sequence[Opener],
        host_metrics: Callable[[], Mapping[str, float]],
        now: Callable[[], float],
    ) -> None:
        """`now` is monotonic seconds."""
        self._slots = [_Slot(o) for o in openers]
        self._host_metrics, self._now = host_metrics, now
        self._energy, self._tokens = Energy(), 0.0
        self._lock = threading.Lock()
        self._latest: tuple[Reading, ...] = ()

    def sample(self) -> tuple[Reading, ...]:
        """Called by one thread, every interval."""
        readings = [r for slot in self._slots for r in self._read(slot)]
        readings = list({r.wire_name: r for r in reversed(readings)}.values())[::-1]
        serving = serving_readings(self._host_metrics())
        tokens = next((r.value for r in serving if r.name == TOKENS), 0.0)
        readings += [*serving, *self._energy_readings(readings, tokens)]
        with self._lock:
            self._latest = tuple(readings)
        return self._latest

    def latest(self) -> tuple[Reading, ...]:
        """Of the last `sample`, from any thread."""
        with self._lock:
            return self._latest

    def absent(self) -> dict[str, str]:
        """Sources that are not open, and why."""
        return {s.opener.name: s.why_absent for s in self._slots if s.source is None}

    def close(self) -> None:
        for slot in self._slots:
            if slot.source is not None:
                slot.source.close()
                slot.source = None

    def _read(self, slot: _Slot) -> Iterable[Reading]:
        try:
            if slot.source is None:
                if self._now() < slot.retry_at_s:
                    return ()
                slot.source = slot.opener.open()
            return list(slot.source.read())
        except Unavailable as e:
            self._lose(slot, str(e))
            return ()

    def _lose(self, slot: _Slot, why: str) -> None:
        if why != slot.why_absent:
            log.info("telemetry.absent", extra={"source": slot.opener.name, "why": why})
        if slot.source is not None:
            slot.source.close()
        slot.source, slot.why_absent = None, why
        slot.retry_at_s = self._now() + _REOPEN_AFTER_S

    def _energy_readings(self, readings: Iterable[Reading], tokens: float) -> list[Reading]:
        watts = next((r.value for r in readings if r.wire_name == "power_watts"), None)
        before = self._energy.joules
        self._energy = self._energy.add(watts, self._now())
        made, self._tokens = tokens - self._tokens, tokens
        if watts is None:
            return []
        answer = [Reading("energy_joules_total", self._energy.joules)]
        per_token = joules_per_token(self._energy.joules - before, made)
        if per_token is not None:
            answer.append(Reading("joules_per_token", per_token))
        return answer
