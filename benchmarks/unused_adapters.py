"""What resident adapters cost a step that uses none, with the noise of the comparison beside it.

    python benchmarks/unused_adapters.py [--work DIR] [--threads N] [--rounds N]

Three engines of one Qwen2.5-0.5B-shaped int4 model in one process: two without adapters and one
with eight of rank 16 on all projections. Each decodes a few tokens in turn, in random order, so
that whatever else the machine does meets all alike. The second engine without adapters shows how
far two equal ones differ. Processor time is told too: on a shared machine it is steadier.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from adapter_swap import write
from decode import checkpoint_in, remora_worker
from rich.console import Console
from rich.table import Table

from remora_agent.bank.weights import load_weights
from remora_agent.engine.cache import EngineCache
from remora_agent.engine.opening import EngineOptions, open_engine
from remora_agent.engine.protocol import Engine, RowStep
from remora_contract.bundle import load_bundle

BLOCK, PAST, ADAPTERS, STEPS = 32, 128, 8, 3
BARE, SECOND, RESIDENT = "none resident", "none resident, again", f"{ADAPTERS} resident, none used"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, help="keeps checkpoint, model and adapters (2 GB)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    if arguments.work is None:
        with tempfile.TemporaryDirectory(prefix="unused-bench-") as work:
            measure(arguments, Path(work))
    else:
        arguments.work.mkdir(parents=True, exist_ok=True)
        measure(arguments, arguments.work)


def measure(arguments: argparse.Namespace, work: Path) -> None:
    # Makes bundle and engine.
    remora_worker(work, checkpoint_in(work), BLOCK, arguments.threads).close()
    engines = {name: opened(work, arguments.threads) for name in (BARE, RESIDENT, SECOND)}
    load_adapters(engines[RESIDENT], work)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    order = random.Random(0)
    for _ in range(arguments.rounds):
        for name in order.sample(sorted(engines), len(engines)):
            samples[name] += steps(engines[name])
    table = Table(title="A step that uses no adapter, ms at the median")
    for column in ("engine", "wall", "of the first", "processor", "of the first"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    base = [statistics.median(s[i] for s in samples[BARE]) for i in (0, 1)]
    for name, found in samples.items():
        own = [statistics.median(s[i] for s in found) for i in (0, 1)]
        cells = [
            f for o, b in zip(own, base, strict=True) for f in (f"{o * 1e3:.2f}", f"{o / b:.3f}")
        ]
        table.add_row(name, *cells)
    Console().print(table)
    for engine in engines.values():
        engine.close()


def opened(work: Path, threads: int) -> Engine:
    cache = EngineCache(work / "engines", 1 << 40)
    engine = open_engine(work / f"bundle-{BLOCK}", cache, EngineOptions(rows=8, threads=threads))
    engine.prefill(0, np.arange(100, 100 + PAST), 0)
    return engine


def load_adapters(engine: Engine, work: Path) -> None:
    bundle = load_bundle(work / f"bundle-{BLOCK}")
    for i in range(ADAPTERS):
        path = work / f"adapter-{i}"
        if not path.exists():
            write(path, bundle, seed=i)
        engine.add_adapter(engine.prepare(load_weights(path, bundle)))


def steps(engine: Engine) -> list[tuple[float, float]]:
    """Seconds of wall and processor for each; a first call, with cold caches, is not counted."""
    engine.prefill(0, np.array([100]), PAST)
    found = []
    for i in range(1, 1 + STEPS):
        began, busy = time.perf_counter(), time.process_time()
        engine.decode([RowStep(0, 5, PAST + i)])
        found.append((time.perf_counter() - began, time.process_time() - busy))
    return found


if __name__ == "__main__":
    main()
