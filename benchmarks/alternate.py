"""Comparing programs on a machine that is not quiet: blocks of each in turn, ratio of medians.

Every program runs in its own process and answers one JSON line a block; only one works at a time.
Blocks during which other programs were busy are set apart.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

QUIET_CORES = 0.25
_TICKS = os.sysconf("SC_CLK_TCK")


class Worker:
    """A child that prints {"ready": ...} and then, for each request line, {"seconds": [...]}."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.facts = self._read()

    def block(self, request: Mapping[str, Any]) -> list[float]:
        """Seconds of each step of one block."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return list(self._read()["seconds"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def busy_s(self) -> float:
        """Processor seconds of the child, and of its own children that have ended, so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / _TICKS

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise SystemExit(f"a worker ended early: {self._process.args}")


@dataclass
class Samples:
    """Step times of one program in one measure; quiet ones apart."""

    quiet: list[float] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)

    @property
    def median_s(self) -> float:
        """Of the quiet steps, or of all when there were none."""
        return statistics.median(self.quiet or self.disturbed)

    @property
    def note(self) -> str:
        """How many steps count, and whether they were quiet."""
        return f"{len(self.quiet)} quiet" if self.quiet else f"{len(self.disturbed)} DISTURBED"


def alternate(
    workers: Mapping[str, Worker], request: Mapping[str, Any], rounds: int, limit_s: float = 60.0
) -> dict[str, Samples]:
    """Blocks of each worker in turn, until each has `rounds` quiet ones or `limit_s` is over.

    A block is quiet when other programs took less than a quarter of a core meanwhile. One block of
    each comes first and does not count.
    """
    samples = {name: Samples() for name in workers}
    quiet_blocks = dict.fromkeys(workers, 0)
    for worker in workers.values():
        worker.block(request)
    began = time.perf_counter()
    while min(quiet_blocks.values()) < rounds and time.perf_counter() - began < limit_s:
        for name, worker in workers.items():
            wait_for_quiet()
            seconds, others = _block(worker, request)
            if others < QUIET_CORES:
                samples[name].quiet += seconds
                quiet_blocks[name] += 1
            else:
                samples[name].disturbed += seconds
    return samples


def _block(worker: Worker, request: Mapping[str, Any]) -> tuple[list[float], float]:
    """Step times, and how many cores other programs took meanwhile."""
    began, all_busy, own_busy = time.perf_counter(), busy_s(), worker.busy_s()
    seconds = worker.block(request)
    wall = time.perf_counter() - began
    return seconds, ((busy_s() - all_busy) - (worker.busy_s() - own_busy)) / wall


def wait_for_quiet() -> None:
    """Up to two seconds, for other programs to pause."""
    for _ in range(20):
        busy, began = busy_s(), time.perf_counter()
        time.sleep(0.1)
        if (busy_s() - busy) / (time.perf_counter() - began) < QUIET_CORES:
            return


def busy_s() -> float:
    """Processor seconds of everything on this machine since it started."""
    ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / _TICKS
