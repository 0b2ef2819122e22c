"""What adapters cost: rank 16 on all projections of a Qwen2.5-0.5B-shaped int4 model.

    python benchmarks/adapters.py [--work DIR] [--threads N] [--rounds N] [--block 32|128]

Both engines live in one process and take a few steps in turn, in an order drawn anew each round. A
ratio is the median over rounds of two neighbours in time, so that what else the machine does meets
both alike; processor time is told beside wall time, because on a shared machine it is steadier.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from adapter_swap import write
from decode import checkpoint_in, remora_bundle
from rich.console import Console

from remora_agent.bank.weights import load_weights
from remora_agent.engine.cache import EngineCache
from remora_agent.engine.opening import EngineOptions, open_engine
from remora_agent.engine.protocol import Engine, Mix, MixEntry, RowStep
from remora_contract.bundle import load_bundle

PAST, ROWS, PROMPT = 128, 8, 512

Work = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, help="keeps checkpoint and models (3 GB)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40, help="blocks of each form")
    parser.add_argument("--steps", type=int, default=2, help="that count in a block")
    parser.add_argument("--block", type=int, default=32, choices=(32, 128))
    arguments = parser.parse_args()
    if arguments.work is None:
        with tempfile.TemporaryDirectory(prefix="adapters-bench-") as work:
            measure(arguments, Path(work))
    else:
        arguments.work.mkdir(parents=True, exist_ok=True)
        measure(arguments, arguments.work)


def measure(arguments: argparse.Namespace, work: Path) -> None:
    bundle = remora_bundle(work, checkpoint_in(work), arguments.block)
    cache = EngineCache(work / "engines", 1 << 40)
    say = Console(width=150).print
    say(f"load {os.getloadavg()}, {arguments.threads} threads")
    bare, own = (Subject(bundle, cache, arguments.threads, n) for n in (0, ROWS))
    one, eight = [0] * ROWS, list(range(ROWS))
    pairs: list[tuple[str, Work, Work]] = [
        ("resident, none used", own.step([None]), bare.step([None])),
        ("batch 1, one adapter / none", own.step([0]), own.step([None])),
        ("batch 8, one adapter / none", own.step(one), own.step([None] * ROWS)),
        ("batch 8, eight adapters / none", own.step(eight), own.step([None] * ROWS)),
        ("batch 8, eight adapters / one", own.step(eight), own.step(one)),
        ("a swap, batch 1 / the same adapter", own.swap(), own.step([0])),
    ]
    for what, work_, against in pairs:
        say(f"{what:36}", compared(work_, against, arguments.rounds, arguments.steps))
    ratios = compared(own.prompt(0), own.prompt(None), arguments.rounds // 4, 1)
    say(f"{PROMPT} tokens of a prompt / none".ljust(36), ratios)
    say(f"load {os.getloadavg()}")
    for subject in (bare, own):
        subject.close()


class Subject:
    """An engine with some random adapters, read from files, all rows filled."""

    def __init__(self, bundle: Path, cache: EngineCache, threads: int, adapters: int) -> None:
        options = EngineOptions(rows=ROWS, threads=threads)
        self._engine: Engine = open_engine(bundle, cache, options)
        self._handles = []
        for i in range(adapters):
            path, described = bundle.parent / f"adapter-{i}", load_bundle(bundle)
            if not path.exists():
                write(path, described, seed=i)
            weights = self._engine.prepare(load_weights(path, described))
            self._handles.append(self._engine.add_adapter(weights))
        self._tokens = np.random.default_rng(1).integers(3, 1000, PROMPT)
        for row in range(ROWS):
            self._engine.prefill(row, self._tokens[:PAST], 0)
        self._turn = 0

    def close(self) -> None:
        self._engine.close()

    def step(self, adapters: list[int | None]) -> Work:
        """One step of a row for each entry of `adapters`."""
        steps = [RowStep(row, 5, PAST, self._mix(a)) for row, a in enumerate(adapters)]

        def work() -> None:
            self._engine.decode(steps)

        return work

    def swap(self) -> Work:
        """A step with another adapter than the one before."""
        steps = [[RowStep(0, 5, PAST, self._mix(a))] for a in range(ROWS)]

        def work() -> None:
            self._turn += 1
            self._engine.decode(steps[self._turn % ROWS])

        return work

    def prompt(self, adapter: int | None) -> Work:
        def work() -> None:
            self._engine.prefill(0, self._tokens, 0, self._mix(adapter))

        return work

    def _mix(self, adapter: int | None) -> Mix:
        return () if adapter is None else (MixEntry(self._handles[adapter], 1.0),)


def compared(work: Work, against: Work, rounds: int, steps: int) -> str:
    """Medians of both and of the rounds' ratios; a first step of each block, with cold caches, does
    not count."""
    sides: tuple[list[tuple[float, float]], ...] = ([], [])
    order = random.Random(0)
    for _ in range(rounds):
        for i in order.sample((0, 1), 2):
            (work, against)[i]()
            sides[i].append(_best(work if i == 0 else against, steps))
    wall, busy = (
        statistics.median(a[i] / b[i] for a, b in zip(*sides, strict=True)) for i in (0, 1)
    )
    own, other = (statistics.median(w for w, _ in side) * 1e3 for side in sides)
    quick, quick_other = (min(w for w, _ in side) * 1e3 for side in sides)
    return (
        f"{own:7.2f} / {other:7.2f} ms {100 * (wall - 1):+6.1f} % ({1 / wall:.3f}x), "
        f"processor {100 * (busy - 1):+6.1f} %, fastest {quick:7.2f} / {quick_other:7.2f} "
        f"{100 * (quick / quick_other - 1):+6.1f} %"
    )


def _best(work: Work, steps: int) -> tuple[float, float]:
    """Least wall and processor seconds of `steps`: what else ran can only have added."""
    walls, busy = [], []
    for _ in range(steps):
        began, began_busy = time.perf_counter(), time.process_time()
        work()
        walls.append(time.perf_counter() - began)
        busy.append(time.process_time() - began_busy)
    return min(walls), min(busy)


if __name__ == "__main__":
    main()
