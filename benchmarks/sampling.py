"""What each option of a request costs per token, outside the engine.

    python benchmarks/sampling.py [--vocab 151936] [--tokens 400] [--seen 2000]

Draws from prepared logits, shaped as a trained model's: a few likely tokens, a long tail. The
vocabulary of the constraint is made up: every short byte string, then random words. Medians in
microseconds of the thread's own time, so that a busy machine hardly shows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from remora_agent.runtime.api import Constraint, ConstraintKind, SamplingParams
from remora_agent.runtime.constraint import GrammarCompiler
from remora_agent.runtime.logprobs import scored
from remora_agent.runtime.sampling import Sampler

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "tags"],
}
CASES = {
    "greedy": SamplingParams(),
    "top-p 0.95": SamplingParams(1.0, top_p=0.95, seed=1),
    "top-p 0.95, min-p 0.05": SamplingParams(1.0, top_p=0.95, min_p=0.05, seed=1),
    "greedy, repetition": SamplingParams(repetition_penalty=1.1),
    "greedy, presence and frequency": SamplingParams(presence_penalty=0.5, frequency_penalty=0.5),
    "greedy, 300 biases": SamplingParams(logit_bias=tuple((i, -1.0) for i in range(300))),
}


def logits_of(vocab: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    logits = random.standard_normal(vocab).astype(np.float32) * 2
    logits[random.integers(0, vocab, 40)] = random.uniform(8, 18, 40)
    return logits


def made_up_vocabulary(vocab: int) -> tuple[list[bytes], list[int]]:
    random = np.random.default_rng(1)
    words = {bytes([b]) for b in range(256)}
    letters = np.frombuffer(b' etaoinshrdlucmfwypvbgk"{}[]:,0123456789', np.uint8)
    while len(words) < vocab - 1:
        words.add(random.choice(letters, random.integers(2, 9)).tobytes())
    return [*sorted(words), b"<end>"], [vocab - 1]


def median_us(work: Callable[[], object], count: int) -> float:
    seconds = []
    for _ in range(count):
        began = time.thread_time_ns()
        work()
        seconds.append((time.thread_time_ns() - began) / 1e3)
    return statistics.median(seconds)


def constrained(vocab: int, logits: np.ndarray, tokens: int) -> tuple[float, float, float]:
    """Milliseconds to read the vocabulary, and to compile; median microseconds a token more."""
    vocabulary = made_up_vocabulary(vocab)
    compiler = GrammarCompiler(lambda: vocabulary, vocab, [vocab - 1])
    began = time.perf_counter()
    compiler.compile(Constraint(ConstraintKind.REGEX, "a")).result(120)
    first_s = time.perf_counter() - began
    began = time.perf_counter()
    text = json.dumps(SCHEMA)
    grammar = compiler.compile(Constraint(ConstraintKind.JSON_SCHEMA, text)).result(120)
    compile_s = time.perf_counter() - began
    sampler, matcher, spent = Sampler(SamplingParams(1.0, seed=1), 0), grammar.start(), []
    for _ in range(tokens):
        began_ns = time.thread_time_ns()
        allowed = matcher.allowed(vocab)
        taken_ns = time.thread_time_ns() - began_ns
        token = sampler.draw(logits, allowed)
        began_ns = time.thread_time_ns()
        if token == vocab - 1:
            matcher = grammar.start()
        else:
            matcher.advance(token)
            matcher = grammar.start() if matcher.finished else matcher
        spent.append((taken_ns + time.thread_time_ns() - began_ns) / 1e3)
    compiler.close()
    return first_s * 1e3, compile_s * 1e3, statistics.median(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=151_936, help="tokens of the vocabulary")
    parser.add_argument("--tokens", type=int, default=400, help="tokens drawn for each figure")
    parser.add_argument("--seen", type=int, default=2000, help="tokens of the prompt")
    options = parser.parse_args()
    logits = logits_of(options.vocab)
    prompt = np.random.default_rng(2).integers(0, options.vocab, options.seen).tolist()
    for name, params in CASES.items():
        sampler = Sampler(params, 0, prompt)
        print(f"{name:34} {median_us(lambda s=sampler: s.draw(logits), options.tokens):9.0f} us")
    for top in (0, 5, 20):
        spent_us = median_us(lambda top=top: scored(logits, 7, top), options.tokens)
        print(f"{f'logprobs, {top} of the likeliest':34} {spent_us:9.0f} us")
    allowed = np.ones(options.vocab, bool)
    sampler = Sampler(SamplingParams(), 0)
    spent_us = median_us(lambda: sampler.draw(logits, allowed), options.tokens)
    print(f"{'greedy, under a mask':34} {spent_us:9.0f} us")
    first_ms, compile_ms, mask_us = constrained(options.vocab, logits, options.tokens)
    print(f"{'reading the vocabulary, once':34} {first_ms:9.0f} ms")
    print(f"{'compiling a schema':34} {compile_ms:9.1f} ms")
    print(f"{'its mask and step':34} {mask_us:9.0f} us")


if __name__ == "__main__":
    main()
