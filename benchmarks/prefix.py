"""Time to the first token with a cached prefix, and the pace of streams beside a long prompt.

    python benchmarks/prefix.py [--work DIR] [--threads N] [--repeats N]

A whole runtime on a Qwen2.5-0.5B-shaped random int4 engine. The first table asks the same prompt
with more and more of it cached: the time should follow the tokens that are new. The second lets
seven answers run while a long prompt is read, with and without a bound of the time between tokens.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from decode import checkpoint_in
from rich.console import Console
from rich.table import Table

from remora_agent.engine.cache import EngineCache
from remora_agent.engine.opening import EngineOptions, open_engine
from remora_agent.runtime.api import (
    Delta,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    SamplingParams,
    StoppingParams,
)
from remora_agent.runtime.model_runtime import ModelRuntime
from remora_agent.runtime.options import RuntimeOptions
from remora_contract.bundle import load_bundle

PROMPT = 1024
CACHED = (0, 512, 768, 896, 960, 992)
LONG = 1536
STREAMS = 7
BLOCK = 128


class Heard:
    """When a request's events came."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.tokens: list[float] = []  # when each came
        self.finished: Finished | None = None
        self.first, self.ended = threading.Event(), threading.Event()

    def __call__(self, event: Event) -> None:
        now = time.perf_counter()
        if isinstance(event, Delta):
            self.tokens += [now] * len(event.token_ids)
            self.first.set()
        elif isinstance(event, Finished | Failed):
            self.finished = event if isinstance(event, Finished) else None
            self.ended.set()

    def end(self) -> Finished:
        self.ended.wait()
        if self.finished is None:
            raise SystemExit("a request failed")
        return self.finished


def ask(runtime: ModelRuntime, name: str, prompt: np.ndarray, count: int) -> Heard:
    heard = Heard()
    stopping = StoppingParams(count, ignore_eos=True)
    ids = tuple(map(int, prompt))
    runtime.submit(GenerationRequest(name, ids, (), SamplingParams(), stopping), heard)
    return heard


def first_tokens(open_runtime: Callable[..., ModelRuntime], repeats: int) -> Table:
    table = Table(title=f"time to the first token of a {PROMPT}-token prompt")
    for column in ("cached", "new", "ms", "ms a new token", "of uncached", "new / all"):
        table.add_column(column, justify="right")
    runtime, random, whole_s = open_runtime(), np.random.default_rng(0), 0.0
    ask(runtime, "warm", random.integers(3, 9000, PROMPT), 1).end()
    for cached in CACHED:
        seconds = []
        for i in range(repeats):
            prompt = random.integers(3, 9000, PROMPT)
            if cached:
                ask(runtime, f"fill {i}", prompt[: cached + 1], 1).end()
                # In another row's place, so that the prefix is copied back.
                others = [
                    ask(runtime, f"other {row}", random.integers(3, 9000, 33), 1)
                    for row in range(8)
                ]
                for other in others:
                    other.end()
            finished = ask(runtime, f"asked {i}", prompt, 1).end()
            assert finished.usage.cached_tokens == cached, finished.usage
            seconds.append(finished.timings.prefill_s)
        took = min(seconds)  # whatever else the machine does makes it longer
        whole_s, new = whole_s or took, PROMPT - cached
        shares = (f"{took / whole_s:.3f}", f"{new / PROMPT:.3f}")
        table.add_row(
            str(cached), str(new), f"{took * 1e3:.1f}", f"{took / new * 1e3:.2f}", *shares
        )
    runtime.close()
    return table


def paces(open_runtime: Callable[..., ModelRuntime]) -> Table:
    table = Table(title=f"{STREAMS} streams while {LONG} tokens are read, seconds between tokens")
    for column in ("bound", "median alone", "median", "p95", "longest", "prompt read in"):
        table.add_column(column, justify="right")
    for bound in (0.1, 0.25, 0.5, 1e9):
        runtime = open_runtime(inter_token_s=bound, prefix_bytes=0)
        random = np.random.default_rng(1)
        streams = [ask(runtime, f"{i}", random.integers(3, 9000, 64), 400) for i in range(STREAMS)]
        for stream in streams:
            stream.first.wait()
        time.sleep(2.0)
        begin = time.perf_counter()
        long = ask(runtime, "long", random.integers(3, 9000, LONG), 1).end()
        end = time.perf_counter()
        alone, during = _gaps(streams, begin - 2.0, begin), _gaps(streams, begin, end)
        figures = [
            statistics.median(alone),
            statistics.median(during),
            sorted(during)[int(0.95 * len(during))],
            max(during),
            long.timings.prefill_s,
        ]
        shown = "none" if bound > 1e6 else f"{bound:g}"
        table.add_row(shown, *(f"{x:.3f}" for x in figures))
        runtime.close()
    return table


def _gaps(streams: list[Heard], begin: float, end: float) -> list[float]:
    """Between tokens of one stream, of those that ended within the time."""
    return [
        later - earlier
        for stream in streams
        for earlier, later in zip(stream.tokens, stream.tokens[1:], strict=False)
        if begin <= later <= end
    ]


def bundle_in(work: Path) -> Path:
    bundle = work / f"bundle-{BLOCK}"
    if not bundle.exists():
        flags = ["--int4-block", str(BLOCK), "--max-context", "2048", "--max-bank-rank", "256"]
        program = "from remora_build.cli import main; main()"
        command = [sys.executable, "-c", program, "export", str(checkpoint_in(work)), str(bundle)]
        subprocess.run([*command, *flags], check=True, stdout=subprocess.DEVNULL)
    return bundle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, help="keeps checkpoint and engine (2 GB)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="prefix-bench-") as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        bundle = bundle_in(work)

        def open_runtime(**options: float) -> ModelRuntime:
            cache = EngineCache(work / "engines", 1 << 40)
            engine = open_engine(bundle, cache, EngineOptions(rows=8, threads=arguments.threads))
            made = RuntimeOptions(**options)  # type: ignore[arg-type]
            return ModelRuntime.open(engine, load_bundle(bundle), bundle, options=made)

        Console().print(first_tokens(open_runtime, arguments.repeats))
        Console().print(paces(open_runtime))


if __name__ == "__main__":
    main()
