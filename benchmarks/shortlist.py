"""What a step costs the host for sampling: from all logits, and from a device's shortlists.

    python benchmarks/shortlist.py [--rows 8] [--vocab 151936] [--shortlist 256] [--steps 200]
                                   [--logits body|zipf] [--exponent 1.3]

Both draw the same tokens, which is checked, from prepared logits: `body` is a few likely tokens
above a normal distribution, `zipf` is -exponent * log(rank) with noise, whose tail is long. They
take turns step by step in one process, on the thread's own time. Shortlists are made beforehand: on
a device that is the device's work. Not in the times, and said beside: bytes read back, and what the
reading costs at a bandwidth (--gbps), the least that any way of moving them takes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from sampling import logits_of

from remora_agent.runtime.api import SamplingParams
from remora_agent.runtime.sampling import Logits, Sampler
from remora_agent.runtime.shortlist import ShortRow
from remora_contract.trt_memory import WATCHED
from tests.support.shortlist_engine import shortlisted

CASES = {
    "greedy": SamplingParams(),
    "greedy, repetition": SamplingParams(repetition_penalty=1.1),
    "top-k 50": SamplingParams(1.0, top_k=50, seed=1),
    "top-p 0.95": SamplingParams(1.0, top_p=0.95, seed=1),
    "top-k 20, top-p 0.8": SamplingParams(0.7, top_k=20, top_p=0.8, seed=1),
    "min-p 0.05": SamplingParams(1.0, min_p=0.05, seed=1),
    "top-p 0.99": SamplingParams(1.0, top_p=0.99, seed=1),
    "temperature 0.7": SamplingParams(0.7, seed=1),
    "temperature 1.0": SamplingParams(1.0, seed=1),
    "1.0, repetition": SamplingParams(1.0, seed=1, repetition_penalty=1.1),
    "0.7, repetition of 3000 tokens": SamplingParams(0.7, seed=1, repetition_penalty=1.1),
}
PROMPT = 200  # tokens, of which a repetition penalty knows at first
LONG = 3000  # more than a device watches
NOISE = 0.3


class Step:
    """One case's requests, twice: `full` draws from all logits, `short` from shortlists."""

    def __init__(
        self, params: SamplingParams, logits: Logits, shortlist: int, prompt: Sequence[int]
    ) -> None:
        rows = range(len(logits))
        self.full = [Sampler(params, i, prompt) for i in rows]
        self.short = [Sampler(params, i, prompt) for i in rows]
        self._logits = logits
        self._shortlist = shortlist
        self.read_whole = 0
        self.bytes = 0  # of the last step's shortlists

    def all_logits(self) -> list[int]:
        return [s.draw(row) for s, row in zip(self.full, self._logits, strict=True)]

    def from_shortlists(self) -> Callable[[], list[int]]:
        """What is timed, behind what the device does."""
        watches = [s.watch(WATCHED) for s in self.short]
        found = shortlisted(self._logits, watches, self._shortlist)
        watched = 4 * WATCHED * len(watches) * any(len(w.ids) for w in watches)  # padded
        self.bytes = found.ids.nbytes + found.logits.nbytes + 8 * len(watches) + watched
        vocab = self._logits.shape[1]

        def draw() -> list[int]:
            tokens = []
            for i, sampler in enumerate(self.short):
                read = partial(self._read, i)
                row = ShortRow(found, i, sampler.watch(WATCHED), vocab, read)
                token = sampler.pick(row)
                tokens.append(sampler.draw(row.all) if token is None else token)
            return tokens

        return draw

    def _read(self, row: int) -> Logits:
        self.read_whole += 1
        return self._logits[row]


def _zipf(exponent: float, vocab: int, seed: int) -> Logits:
    random = np.random.default_rng(seed)
    logits = random.standard_normal(vocab) * NOISE - exponent * np.log(np.arange(1.0, vocab + 1))
    return random.permutation(logits).astype(np.float32)


def measure(step: Step, steps: int) -> tuple[float, float]:
    """Median microseconds a step of each way; the order changes with every step."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(steps):
        work = (step.all_logits, step.from_shortlists())
        tokens: list[list[int]] = [[], []]
        for which in (0, 1) if turn % 2 else (1, 0):
            began = time.thread_time_ns()
            tokens[which] = work[which]()
            seconds[which].append((time.thread_time_ns() - began) / 1e3)
        if tokens[0] != tokens[1]:
            raise SystemExit(f"step {turn}: {tokens[0]} from all logits, {tokens[1]} otherwise")
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--shortlist", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--gbps", type=float, default=10.0, help="of the copy to the host")
    parser.add_argument("--logits", choices=["body", "zipf"], default="body")
    parser.add_argument("--exponent", type=float, default=1.3, help="of zipf")
    args = parser.parse_args()
    make = logits_of if args.logits == "body" else partial(_zipf, args.exponent)
    logits = np.stack([make(args.vocab, seed) for seed in range(args.rows)])
    table = Table(
        "case", "all logits µs", "shortlist µs", "ratio", "rows read whole",
        "KB read back: all", "shortlist", f"µs at {args.gbps:g} GB/s: all", "shortlist",
        title=f"a step of {args.rows} rows, {args.vocab} tokens, shortlists of {args.shortlist}, "
        f"{args.logits} {args.exponent if args.logits == 'zipf' else ''}",
    )  # fmt: skip
    for name, params in CASES.items():
        prompt = range(LONG if str(LONG) in name else PROMPT)
        step = Step(params, logits, args.shortlist, prompt)
        full, short = measure(step, args.steps)
        whole = step.read_whole / (args.steps * args.rows)
        moved = step.bytes + whole * logits.nbytes
        table.add_row(
            name, f"{full:.0f}", f"{short:.0f}", f"{full / short:.1f}", f"{whole:.2%}",
            f"{logits.nbytes / 1e3:.0f}", f"{moved / 1e3:.1f}",
            f"{logits.nbytes / args.gbps / 1e3:.0f}", f"{moved / args.gbps / 1e3:.1f}",
        )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
