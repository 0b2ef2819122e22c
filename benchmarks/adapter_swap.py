"""Swaps of adapters while the model decodes, and first tokens when more are wanted than fit.

    python benchmarks/adapter_swap.py [--work DIR] [--threads N] [--swaps N] [--requests N]

A whole runtime on a Qwen2.5-0.5B-shaped int4 model, rank-16 float16 adapters on all projections.
Swaps: what an adapter in host memory and one on disk (in the page cache) cost, and the longest
pause of an answer that is decoded meanwhile; a swap of resident ones is in benchmarks/adapters.py.
Crowd: as many clients as rows, each asking for one adapter after the other; adapters as many as
places, then twice as many, with turns and, for comparison, with turns too short to matter. Absolute
figures are this machine's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from decode import checkpoint_in, remora_worker
from rich.console import Console
from rich.table import Table

from remora_agent.bank.directory import AdapterDirectory
from remora_agent.engine.cache import EngineCache
from remora_agent.engine.opening import EngineOptions, open_engine
from remora_agent.runtime.api import (
    AdapterRef,
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
from remora_build.adapters.sidecar import Factor, write_adapter
from remora_contract.bundle import Bundle, load_bundle
from remora_contract.targets import PROJECTIONS, AdapterTarget

BLOCK, RANK, ROWS, PLACES = 32, 16, 8, 4
PROMPT, ANSWER = 16, 8
NO_TURNS_S = 1e-3
PUBLISHED = "SGLang, 8 places, published: 40 ms with 8 adapters, 6278 ms with 16 (157 times)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, help="keeps checkpoint, model and adapters (2 GB)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--swaps", type=int, default=12, help="of each kind")
    parser.add_argument("--requests", type=int, default=64, help="of each crowd")
    parser.add_argument("--turn", type=float, default=2.0, help="seconds of an adapter's turn")
    arguments = parser.parse_args()
    if arguments.work is None:
        with tempfile.TemporaryDirectory(prefix="swap-bench-") as work:
            measure(arguments, Path(work))
    else:
        arguments.work.mkdir(parents=True, exist_ok=True)
        measure(arguments, arguments.work)


def measure(arguments: argparse.Namespace, work: Path) -> None:
    # Makes bundle and engine.
    remora_worker(work, checkpoint_in(work), BLOCK, arguments.threads).close()
    world = World(work, arguments.threads)
    swaps = Table(title="Swap while decoding, ms (median, longest)")
    for column in ("from", "swap", "goal", "longest pause of a running answer"):
        swaps.add_column(column, justify="left" if column == "from" else "right")
    with world.opened(RuntimeOptions(bank_rank=2 * RANK)) as running:
        for row in running.swaps(arguments.swaps):
            swaps.add_row(*row)
    Console().print(swaps)
    crowd = Table(
        title=f"First tokens, {PLACES} places, {ROWS} rows, {arguments.requests} requests"
    )
    for column in ("adapters", "turns", "median s", "longest s", "loads", "seconds in all"):
        crowd.add_column(column, justify="right")
    for adapters, turn_s in (
        (PLACES, arguments.turn),
        (2 * PLACES, arguments.turn),
        (2 * PLACES, NO_TURNS_S),
    ):
        options = RuntimeOptions(bank_rank=PLACES * RANK, patience_s=turn_s, prefix_bytes=0)
        with world.opened(options) as running:
            told = "no" if turn_s == NO_TURNS_S else f"{turn_s:g} s"
            crowd.add_row(str(adapters), told, *running.crowd(adapters, arguments.requests))
    Console().print(crowd)
    Console().print(PUBLISHED)


class World:
    """Bundle, adapters on disk, and runtimes on them."""

    def __init__(self, work: Path, threads: int) -> None:
        self._bundle_dir = work / f"bundle-{BLOCK}"
        self._cache = EngineCache(work / "engines", 1 << 40)
        self._options = EngineOptions(rows=ROWS, threads=threads)
        self._bundle = load_bundle(self._bundle_dir)
        self._directory = AdapterDirectory(self._bundle)
        for i in range(2 * PLACES):
            path = work / f"adapter-{i}"
            if not path.exists():
                write(path, self._bundle, seed=i)
            self._directory.register(f"{i}", "r1", path)

    def opened(self, options: RuntimeOptions) -> Running:
        engine = open_engine(self._bundle_dir, self._cache, self._options)
        return Running(
            ModelRuntime.open(engine, self._bundle, self._bundle_dir, self._directory, options)
        )


class Running:
    def __init__(self, runtime: ModelRuntime) -> None:
        self._runtime = runtime
        self._adapters = runtime.adapters

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self._runtime.close()

    def swaps(self, count: int) -> list[tuple[str, str, str, str]]:
        """Rows of the table; one answer without adapters is decoded all the time."""
        for i in range(4):  # the engine's session for adapters, and the files in host memory
            self._adapters.load(f"{i}")
        stream = self._ask("stream", (), 1 << 20)
        stream.heard.acquire()
        rows = []
        for name, goal, swap in (
            ("host memory", "<= 10", self._of_host),
            ("disk", "<= 150", self._of_disk),
        ):
            stream.pauses.clear()
            times = [swap(i) * 1e3 for i in range(count)]
            pause = max(stream.pauses, default=0.0) * 1e3
            rows.append(
                (name, f"{statistics.median(times):.2f}, {max(times):.2f}", goal, f"{pause:.0f}")
            )
        stream.pauses.clear()
        time.sleep(3)
        quiet = max(stream.pauses, default=0.0) * 1e3
        rows.append(("(no swaps)", "", "", f"{quiet:.0f}"))
        self._runtime.cancel("stream")
        return rows

    def _of_host(self, i: int) -> float:
        """Step thread's time; three adapters take turns in two places."""
        before = self._runtime.metrics()["adapter_load_s"]
        self._adapters.load(f"{i % 3}")
        return self._runtime.metrics()["adapter_load_s"] - before

    def _of_disk(self, i: int) -> float:
        """From the call to residence, waiting for the running step included."""
        name = f"{i % 2}"
        self._adapters.unload(name)
        began = time.perf_counter()
        self._adapters.load(name)
        return time.perf_counter() - began

    def crowd(self, adapters: int, requests: int) -> tuple[str, str, str, str]:
        """Median and longest time to the first token, loads, seconds in all."""
        before, began = self._runtime.metrics()["adapter_loads"], time.perf_counter()
        firsts: list[float] = []

        def client(k: int) -> None:
            for i in range(k, requests, ROWS):
                # Clients are out of step, or all would ask for the same adapter at once.
                answer = self._ask(f"{i}", (AdapterRef(f"{(i + i // ROWS) % adapters}"),), ANSWER)
                firsts.append(answer.wait())

        threads = [threading.Thread(target=client, args=(k,)) for k in range(ROWS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if len(firsts) != requests:
            raise SystemExit("a request failed")
        loads = self._runtime.metrics()["adapter_loads"] - before
        seconds = time.perf_counter() - began
        return (
            f"{statistics.median(firsts):.2f}",
            f"{max(firsts):.2f}",
            f"{loads:.0f}",
            f"{seconds:.1f}",
        )

    def _ask(self, request_id: str, adapters: tuple[AdapterRef, ...], tokens: int) -> Heard:
        heard, prompt = Heard(), tuple(range(100, 100 + PROMPT))
        stopping = StoppingParams(tokens, ignore_eos=True)
        self._runtime.submit(
            GenerationRequest(request_id, prompt, adapters, SamplingParams(), stopping), heard
        )
        return heard


class Heard:
    """Pauses between an answer's tokens, and its end."""

    def __init__(self) -> None:
        self.pauses: list[float] = []
        self.heard = threading.Semaphore(0)
        self._last: float | None = None
        self._ended = threading.Event()
        self._end: Event | None = None

    def __call__(self, event: Event) -> None:
        now = time.perf_counter()
        if isinstance(event, Delta):
            if self._last is not None:
                self.pauses.append(now - self._last)
            self._last = now
            self.heard.release()
        elif isinstance(event, Finished | Failed):
            self._end = event
            self._ended.set()

    def wait(self) -> float:
        """Seconds to its first token."""
        self._ended.wait()
        if not isinstance(self._end, Finished):
            raise SystemExit(f"a request failed: {self._end}")
        return self._end.timings.time_to_first_token_s


def write(path: Path, bundle: Bundle, seed: int) -> None:
    random, factors = np.random.default_rng(seed), {}
    for layer in range(bundle.decoder.layers):
        for p in PROJECTIONS:
            k, n = bundle.decoder.in_features(p), bundle.decoder.out_features(p)
            a = random.standard_normal((k, RANK), np.float32) * np.float32(k**-0.5)
            b = random.standard_normal((RANK, n), np.float32) * np.float32(0.02)
            factors[AdapterTarget(layer, p)] = Factor(a, b, 1.0)
    write_adapter(path, factors, base_digest=bundle.base_digest, dtype="float16", source_config={})


if __name__ == "__main__":
    main()
