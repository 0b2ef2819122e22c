"""What a step costs outside the engine, with every row busy.

    python benchmarks/scheduler.py [--rows 8] [--steps 400] [--vocab 151936]

A stand-in engine answers at once with prepared logits, so all that is measured is the runtime:
scheduling, sampling, detokenisation, stop strings and events. The goal is 1 ms a step at 8 rows
with greedy sampling.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from remora_agent.bank.weights import AdapterWeights
from remora_agent.engine.protocol import EngineLimits, Mix, RowStep
from remora_agent.runtime.api import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    SamplingParams,
    StoppingParams,
)
from remora_agent.runtime.model_runtime import ModelRuntime
from remora_agent.runtime.options import RuntimeOptions
from remora_contract.digests import digest_bytes
from remora_contract.errors import Unsupported
from tests.support.runtime import byte_text, make_bundle

CASES = {
    "greedy": SamplingParams(),
    "top-k 50": SamplingParams(1.0, top_k=50, seed=1),
    "top-p 0.95": SamplingParams(1.0, top_p=0.95, seed=1),
    "top-k 20, top-p 0.8": SamplingParams(0.7, top_k=20, top_p=0.8, seed=1),
    "plain temperature": SamplingParams(1.0, seed=1),
}


class InstantEngine:
    """Prepared logits, shaped as a trained model's: a few likely tokens, a long tail."""

    backend = "instant"
    digest = digest_bytes(b"instant engine")

    def __init__(self, rows: int, context: int, vocab: int) -> None:
        random = np.random.default_rng(0)
        self.limits = EngineLimits(rows, context, vocab, 16)
        logits = random.standard_normal((rows, vocab)).astype(np.float32) * 2
        likely = random.integers(0, 256, (rows, 40))
        np.put_along_axis(logits, likely, random.uniform(8, 18, likely.shape), axis=1)
        self._logits = logits.astype(np.float32)

    def prepare(self, weights: AdapterWeights) -> AdapterWeights:
        return weights

    def add_adapter(self, weights: AdapterWeights) -> int:
        return 1

    def remove_adapter(self, handle: int) -> None: ...

    def prefill(
        self,
        row: int,
        tokens: NDArray[np.int64],
        start: int,
        mix: Mix = (),
        length: int | None = None,
    ) -> NDArray[np.float32]:
        return self._logits[row]

    def score(
        self,
        row: int,
        tokens: NDArray[np.int64],
        start: int,
        mix: Mix = (),
        length: int | None = None,
    ) -> NDArray[np.float32]:
        raise Unsupported("this engine has prepared logits only")

    def embed(
        self,
        row: int,
        tokens: NDArray[np.int64],
        start: int,
        mix: Mix = (),
        length: int | None = None,
    ) -> NDArray[np.float32]:
        raise Unsupported("this engine has prepared logits only")

    def decode(self, steps: Sequence[RowStep]) -> NDArray[np.float32]:
        return self._logits[: len(steps)]

    def close(self) -> None: ...


def measure(sampling: SamplingParams, rows: int, steps: int, vocab: int) -> dict[str, float]:
    """Metrics of one run in which all rows decode together."""
    engine = InstantEngine(rows, steps + 8, vocab)
    options = RuntimeOptions(default_max_tokens=steps)
    runtime = ModelRuntime(engine, make_bundle(), byte_text(), options=options)
    ended = threading.Semaphore(0)

    def hear(event: Event) -> None:
        if isinstance(event, Finished | Failed):
            ended.release()

    stopping = StoppingParams(steps, stop=("</answer>", "\n\nUser:"), ignore_eos=True)
    for i in range(rows):
        runtime.submit(GenerationRequest(f"{i}", (1, 2), (), sampling, stopping), hear)
    for _ in range(rows):
        ended.acquire()
    metrics = dict(runtime.metrics())
    runtime.close()
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    print(f"{args.rows} rows, vocabulary {args.vocab}, medians of {args.repeat} runs")
    print(f"{'sampling':24}{'ms a step':>12}{'µs a token':>12}")
    for name, sampling in CASES.items():
        step_s = statistics.median(
            measure(sampling, args.rows, args.steps, args.vocab)["scheduler_step_s"]
            for _ in range(args.repeat)
        )
        print(f"{name:24}{step_s * 1e3:12.3f}{step_s / args.rows * 1e6:12.1f}")


if __name__ == "__main__":
    main()
