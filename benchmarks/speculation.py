"""Prompt-lookup speculation beside plain decoding, with the engine of a Qwen2.5-0.5B-shaped model.

    python benchmarks/speculation.py [--work DIR] [--threads N] [--rounds N] [--tokens N]

A model with random weights says nothing of use, so the answers are given: the engine computes every
step in full, and its logits are then replaced by ones that draw the given text. What is measured is
what the runtime makes of text of that kind: how often it guesses right, and what that is worth with
this engine's step times. Both runtimes answer in turn in one process; ratios of medians.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from decode import checkpoint_in, remora_bundle
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tokenizers import models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).parents[1]))

from remora_agent.bank.weights import AdapterWeights
from remora_agent.engine.cache import EngineCache
from remora_agent.engine.opening import EngineOptions, ensure_built, load_engine
from remora_agent.engine.protocol import Engine, EngineLimits, KvBlock, Mix, RowStep
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
from remora_contract.bundle import load_bundle
from tests.support.runtime import byte_text

ROOT = Path(__file__).resolve().parents[1]
VOCAB = 16_000  # of the tokenizer that cuts the texts
PROMPT = 600
DRAFTS = {"0": (0, False), "8": (8, False), "8 exact": (8, True)}
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Text:
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class Forced:
    """An engine whose logits draw a given text, whatever it computes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.text: tuple[int, ...] = ()

    @property
    def backend(self) -> str:
        return self._engine.backend

    @property
    def digest(self) -> str:
        return self._engine.digest

    @property
    def limits(self) -> EngineLimits:
        return self._engine.limits

    def prepare(self, weights: AdapterWeights) -> AdapterWeights:
        return weights

    def add_adapter(self, weights: AdapterWeights) -> int:
        return self._engine.add_adapter(weights)

    def remove_adapter(self, handle: int) -> None:
        self._engine.remove_adapter(handle)

    def prefill(
        self,
        row: int,
        tokens: NDArray[np.int64],
        start: int,
        mix: Mix = (),
        length: int | None = None,
    ) -> Logits:
        logits = self._engine.prefill(row, tokens, start, mix, length)
        return self._forced(logits[None], start + len(tokens))[0]

    def decode(self, steps: Sequence[RowStep]) -> Logits:
        return self._forced(self._engine.decode(steps), steps[0].position + 1)

    def score(
        self,
        row: int,
        tokens: NDArray[np.int64],
        start: int,
        mix: Mix = (),
        length: int | None = None,
    ) -> Logits:
        return self._forced(self._engine.score(row, tokens, start, mix, length), start + 1)

    def embed(
        self,
        row: int,
        tokens: NDArray[np.int64],
        start: int,
        mix: Mix = (),
        length: int | None = None,
    ) -> Logits:
        return self._engine.embed(row, tokens, start, mix, length)

    def read_kv(self, row: int, start: int, stop: int) -> KvBlock:
        return self._engine.read_kv(row, start, stop)

    def write_kv(self, row: int, start: int, block: KvBlock) -> None:
        self._engine.write_kv(row, start, block)

    def close(self) -> None:
        self._engine.close()

    def _forced(self, logits: Logits, position: int) -> Logits:
        """The token of the text at `position` and after wins."""
        for i, row in enumerate(logits):
            if position + i < len(self.text):
                row[self.text[position + i]] = 1e4
        return logits


def texts(tokens: int) -> dict[str, Text]:
    """Kinds of answer: a program changed in a word, a page of another subject, noise."""
    pages = sorted(ROOT.glob("docs/*.md"))
    cut = tokenizers.Tokenizer(models.BPE())
    cut.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, show_progress=False)
    cut.train([str(p) for p in (*pages, *ROOT.glob("agent/**/*.py"))], trainer)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(cut.encode(text).ids)

    program = (ROOT / "agent/remora_agent/runtime/stepper.py").read_text()
    changed = re.sub(r"\brequest\b", "job", program)
    page, other = (p.read_text() for p in (pages[2], pages[-1]))
    noise = tuple(int(t) for t in np.random.default_rng(0).integers(0, VOCAB, tokens))
    return {
        "edit of the prompt": Text(ids(program)[:PROMPT], ids(changed)[:tokens]),
        "copy of the prompt": Text(ids(page)[:PROMPT], ids(page)[:tokens]),
        "prose of another subject": Text(ids(page)[:PROMPT], ids(other)[:tokens]),
        "random tokens": Text(ids(page)[:PROMPT], noise),
    }


class Bench:
    """One runtime with drafts of at most `most` tokens, `exact` or not."""

    def __init__(self, bundle: Path, engines: Path, threads: int, most: int, exact: bool) -> None:
        options = EngineOptions(rows=1, threads=threads)
        entry = ensure_built(bundle, EngineCache(engines, 1 << 40), options).entry
        described = load_bundle(bundle)
        self._engine = Forced(load_engine(entry, described, options))
        limits = RuntimeOptions(draft_tokens=most, exact_drafts=exact)
        self._runtime = ModelRuntime(self._engine, described, byte_text(), options=limits)
        self._asked = 0

    def answer(self, text: Text) -> tuple[float, float, float]:
        """Seconds a token after the first, and how many were drafted and accepted a token."""
        ended, events = threading.Event(), list[Event]()

        def hear(event: Event) -> None:
            events.append(event)
            if isinstance(event, Finished | Failed):
                ended.set()

        self._engine.text = (*text.prompt, *text.answer)
        self._asked += 1
        before = self._runtime.metrics()
        stopping = StoppingParams(len(text.answer), ignore_eos=True)
        request = GenerationRequest(str(self._asked), text.prompt, (), SamplingParams(), stopping)
        self._runtime.submit(request, hear)
        ended.wait()
        end, after = events[-1], self._runtime.metrics()
        if not isinstance(end, Finished):
            raise SystemExit(f"the request failed: {end}")
        count = len(text.answer)
        drafted, accepted = (
            (after[n] - before[n]) / count for n in ("drafted_tokens", "accepted_tokens")
        )
        return end.timings.decode_s / (count - 1), drafted, accepted

    def close(self) -> None:
        self._runtime.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, help="keeps checkpoint and models (4 GB)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="answers of each runtime and text")
    parser.add_argument("--tokens", type=int, default=200, help="of each answer")
    parser.add_argument("--block", type=int, default=32, choices=(32, 128))
    arguments = parser.parse_args()
    if arguments.work is None:
        with tempfile.TemporaryDirectory(prefix="speculation-bench-") as work:
            measure(arguments, Path(work))
    else:
        arguments.work.mkdir(parents=True, exist_ok=True)
        measure(arguments, arguments.work)


def measure(arguments: argparse.Namespace, work: Path) -> None:
    bundle = remora_bundle(work, checkpoint_in(work), arguments.block)
    engines = work / "engines"
    benches = {
        name: Bench(bundle, engines, arguments.threads, most, exact)
        for name, (most, exact) in DRAFTS.items()
    }
    table = Table(title=f"ms a token, int4 block {arguments.block}, {arguments.threads} threads")
    for column in ("answer", "drafts of", "ms a token", "x plain", "drafted", "accepted"):
        table.add_column(column, justify="left" if column == "answer" else "right")
    for kind, text in texts(arguments.tokens).items():
        found: dict[str, list[tuple[float, float, float]]] = {m: [] for m in benches}
        for round_ in range(arguments.rounds + 1):
            for name, bench in benches.items():
                sample = bench.answer(text)
                if round_:  # the first warms up
                    found[name].append(sample)
        plain = statistics.median(s for s, _, _ in found["0"])
        for name, samples in found.items():
            seconds = statistics.median(s for s, _, _ in samples)
            drafted, accepted = (statistics.median(s[i] for s in samples) for i in (1, 2))
            row = [f"{seconds * 1e3:.1f}", f"{plain / seconds:.2f}"]
            row = [kind, name, *row, f"{drafted:.2f}", f"{accepted:.2f}"]
            Console().print(*row)  # at once too: a run takes minutes
            table.add_row(*row)
    for bench in benches.values():
        bench.close()
    Console().print(table)
    Console().print("drafted and accepted: a token of the answer")


if __name__ == "__main__":
    main()
