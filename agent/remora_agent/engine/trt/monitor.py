"""The builder's phases as our progress. Several of its threads may call at once.

Phases nest: one in ten steps of the outermost may be a phase of a thousand steps itself. Progress
never goes back, and only a change that a person would see is passed on.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from remora_agent.engine.trt.native import native
from remora_agent.host import Progress

_LEAST_STEP = 0.005
_MAX_NAME = 60
_MAX_DEPTH = 16  # names may repeat, so that a phase seems to be its own ancestor


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0
    inner: float = 0.0  # of the step under way, 0..1

    @property
    def fraction(self) -> float:
        return min((self.done + self.inner) / self.steps, 1.0)


@dataclass
class Monitor:
    """Reports between `begin` and `end` of the whole work, both 0..1."""

    progress: Progress
    begin: float
    end: float
    _phases: dict[str, _Phase] = field(default_factory=dict)
    _at: float = 0.0  # of this part, 0..1
    _said: tuple[str, float] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _unheard: bool = False

    def attach(self, trt: Any) -> Any:
        """An IProgressMonitor of the module `trt` that reports here."""
        return native(
            trt.IProgressMonitor,
            phase_start=self.phase_start,
            step_complete=self.step_complete,
            phase_finish=self.phase_finish,
        )

    def phase_start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._phases[name] = _Phase(parent, max(steps, 1))
            self._report(name)

    def step_complete(self, name: str, step: int) -> bool:
        """False, which ends the build, when nobody hears of it any more."""
        with self._lock:
            if phase := self._phases.get(name):
                phase.done, phase.inner = step + 1, 0.0
                self._report(name)
            return not self._unheard

    def phase_finish(self, name: str) -> None:
        with self._lock:
            self._phases.pop(name, None)

    def _report(self, name: str) -> None:
        """From this phase outwards: each is a part of its parent's step under way."""
        shown, phase = name, self._phases[name]
        for _ in range(_MAX_DEPTH):
            if phase.parent is None or phase.parent not in self._phases:
                break
            outer = self._phases[phase.parent]
            outer.inner = max(outer.inner, phase.fraction)
            if outer.parent is not None:
                shown = phase.parent
            phase = outer
        self._at = max(self._at, phase.fraction)
        self._say(shown[:_MAX_NAME].lower())

    def _say(self, phase: str) -> None:
        done = self.begin + (self.end - self.begin) * self._at
        if self._said is not None:
            last, at = self._said
            if phase == last and done - at < _LEAST_STEP:
                return
        self._said = (phase, done)
        try:
            self.progress(phase, done)
        except OSError:  # the parent is gone
            self._unheard = True
