"""python remora_worker.py BUNDLE ENGINES THREADS ADAPTERS PREFILL: our engine, driven line by line.

Requests: {"what": "prefill"|"decode"|"batch"|"swap", ...}; see the functions below.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from remora_agent.bank.weights import AdapterWeights
from remora_agent.engine.cache import EngineCache
from remora_agent.engine.opening import EngineOptions, ensure_built, load_engine
from remora_agent.engine.prefill import check_choice
from remora_agent.engine.protocol import Engine, Mix, MixEntry, RowStep
from remora_contract.bundle import load_bundle
from remora_contract.targets import PROJECTIONS, AdapterTarget

RANK = 16


def main() -> None:
    bundle_dir, engines = Path(sys.argv[1]), Path(sys.argv[2])
    threads, adapters, prefill = sys.argv[3:]
    options = EngineOptions(rows=8, threads=int(threads), prefill=check_choice(prefill))
    built = ensure_built(bundle_dir, EngineCache(engines, 1 << 40), options)
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    engine = load_engine(built.entry, load_bundle(bundle_dir), options)
    seconds = time.perf_counter() - began
    bench = Bench(engine, bundle_dir, int(adapters))
    taken = psutil.Process().memory_info().rss - before
    facts = {"open_s": seconds, "build_s": built.seconds, "rss_mib": taken >> 20}
    say({"ready": True, **facts, "prefill": built.entry.manifest.facts.get("prefill_why", "plain")})
    for line in sys.stdin:
        request = json.loads(line)
        say({"seconds": getattr(bench, request.pop("what"))(**request)})


def say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


class Bench:
    """The engine with some random rank-16 adapters on all projections."""

    def __init__(self, engine: Engine, bundle_dir: Path, adapters: int) -> None:
        self._engine = engine
        self._decoder = load_bundle(bundle_dir).decoder
        self._handles = [engine.add_adapter(self._adapter(i)) for i in range(adapters)]
        self._tokens = np.random.default_rng(1).integers(3, 1000, 4096)
        self._filled: dict[int, int] = {}

    def prefill(self, tokens: int, repeats: int) -> list[float]:
        """Seconds of reading `tokens` tokens into row 0."""
        self._filled.pop(0, None)
        return [
            _timed(lambda: self._engine.prefill(0, self._tokens[:tokens], 0))
            for _ in range(repeats)
        ]

    def decode(self, past: int, steps: int, adapter: int | None = None) -> list[float]:
        """Seconds of each step at `past` tokens, batch 1."""
        return self._steps(past, steps, [adapter])

    def batch(self, past: int, steps: int, adapters: list[int | None]) -> list[float]:
        """Seconds of each step of one row per entry of `adapters`."""
        return self._steps(past, steps, adapters)

    def swap(self, past: int, steps: int) -> list[float]:
        """Extra seconds of a step that follows another adapter's, batch 1."""
        steady = self._steps(past, steps, [0])
        changing = [self._step(past, [i % 2]) for i in range(steps)]
        base = sorted(steady)[len(steady) // 2]
        return [t - base for t in changing]

    def _steps(self, past: int, steps: int, adapters: list[int | None]) -> list[float]:
        for row in range(len(adapters)):
            if self._filled.get(row, 0) != past:
                self._engine.prefill(row, self._tokens[:past], 0)
                self._filled[row] = past
        return [self._step(past, adapters) for _ in range(steps)]

    def _step(self, past: int, adapters: list[int | None]) -> float:
        steps = [RowStep(row, 5, past, self._mix(a)) for row, a in enumerate(adapters)]
        return _timed(lambda: self._engine.decode(steps))

    def _mix(self, adapter: int | None) -> Mix:
        return () if adapter is None else (MixEntry(self._handles[adapter], 1.0),)

    def _adapter(self, seed: int) -> AdapterWeights:
        rng, tensors = np.random.default_rng(seed), {}
        for layer in range(self._decoder.layers):
            for p in PROJECTIONS:
                k, n = self._decoder.in_features(p), self._decoder.out_features(p)
                a = rng.standard_normal((k, RANK), np.float32) * np.float32(k**-0.5)
                b = rng.standard_normal((RANK, n), np.float32) * np.float32(0.02)
                tensors[AdapterTarget(layer, p)] = (a.astype(np.float16), b.astype(np.float16))
        return AdapterWeights(f"sha256:{seed:064x}", tensors)


def _timed(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
