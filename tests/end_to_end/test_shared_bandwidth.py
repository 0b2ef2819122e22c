"""A rollout's devices together download no faster than it says."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TOTAL_BYTES_PER_S = 150 << 10
WINDOW_S = 8.0


def test_three_devices_that_fetch_at_once_stay_within_the_rollouts_bandwidth(stage):
    agents = stage.join("one", "two", "three")
    stage.release("all", stage.artifacts.bundle.reference, "alpha", "beta-1")
    with Meter([agent.state for agent in agents]) as meter:
        rollout = stage.start("all", "--wave", "100%", "--bandwidth", "150K")
        assert stage.ended(rollout)["state"] == "COMPLETED"
    shipped = sum(e["bytes"] for a in agents for e in a.events("artifact.fetched"))
    assert shipped > 2.7 * stage.artifacts.bundle.bytes, "nobody had it from anywhere else"
    assert meter.received > 0.9 * shipped, "the meter saw the bytes"
    mean, fastest = shipped / meter.seconds(), meter.fastest(WINDOW_S)
    print(f"\nmean {mean:.0f} B/s of {TOTAL_BYTES_PER_S}, {WINDOW_S:.0f} s at most {fastest:.0f}")
    assert fastest < 1.2 * TOTAL_BYTES_PER_S
    assert mean > 0.5 * TOTAL_BYTES_PER_S, "what is there is used"
    for agent in agents:
        stage.ask(agent, stage.artifacts.cast.variants(1))


class Meter:
    """Bytes that appear in the agents' chunk folders, sampled."""

    def __init__(self, states: list[Path]) -> None:
        self._sizes: dict[Path, dict[Path, int]] = {state / "cas": {} for state in states}
        self.received = 0
        # When a look began and when it ended, and what had been received.
        self._samples: list[tuple[float, float, int]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def seconds(self) -> float:
        """From the first byte to the last."""
        steps = zip(self._samples, self._samples[1:], strict=False)
        moving = [ended for (_, _, before), (_, ended, now) in steps if now > before]
        return moving[-1] - moving[0]

    def fastest(self, window_s: float) -> float:
        """Bytes a second in the window of that length in which most came: from before one look to
        after another, for a look may take as long as the machine lets it."""
        rates = [0.0]
        for began, _, before in self._samples:
            ends = (s for s in self._samples if s[1] - began >= window_s)
            for _, ended, received in ends:
                rates.append((received - before) / (ended - began))
                break
        return max(rates)

    def _run(self) -> None:
        while not self._done.wait(0.1):
            began = time.monotonic()
            for folder, known in self._sizes.items():
                self._look(folder, known)
            self._samples.append((began, time.monotonic(), self.received))

    def _look(self, folder: Path, known: dict[Path, int]) -> None:
        for directory, _, names in os.walk(folder):  # which passes over what goes meanwhile
            for name in names:
                path = Path(directory, name)
                with contextlib.suppress(FileNotFoundError):
                    self._count(path.with_suffix(""), path.stat().st_size, known)

    def _count(self, chunk: Path, size: int, known: dict[Path, int]) -> None:
        """A part gets its chunk's name when it is whole."""
        self.received += max(0, size - known.get(chunk, 0))
        known[chunk] = size
