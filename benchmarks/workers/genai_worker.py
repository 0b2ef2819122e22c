"""python genai_worker.py MODEL_DIR: onnxruntime-genai, driven line by line. Runs in an environment
that has onnxruntime-genai; nothing of Remora is imported.

Requests: {"what": "prefill", "tokens", "repeats"} and {"what": "decode", "past", "steps"}.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime_genai as og

CONTEXT = 2048


def main() -> None:
    began, before = time.perf_counter(), _rss()
    model = og.Model(sys.argv[1])
    say({"ready": True, "open_s": time.perf_counter() - began, "rss_mib": _rss() - before})
    tokens = np.random.default_rng(1).integers(3, 1000, 4096).astype(np.int32)
    for line in sys.stdin:
        request = json.loads(line)
        if request["what"] == "prefill":
            say({"seconds": prefill(model, tokens[: request["tokens"]], request["repeats"])})
        else:
            say({"seconds": decode(model, tokens[: request["past"]], request["steps"])})


def say(message: dict) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def generator(model: og.Model) -> og.Generator:
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=CONTEXT, min_length=CONTEXT, do_sample=False)
    return og.Generator(model, params)


def prefill(model: og.Model, tokens: np.ndarray, repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        running = generator(model)
        began = time.perf_counter()
        running.append_tokens(tokens)
        running.generate_next_token()
        seconds.append(time.perf_counter() - began)
    return seconds


def decode(model: og.Model, tokens: np.ndarray, steps: int) -> list[float]:
    running = generator(model)
    running.append_tokens(tokens)
    running.generate_next_token()
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        running.generate_next_token()
        seconds.append(time.perf_counter() - began)
    return seconds


def _rss() -> int:
    """MiB"""
    status = Path("/proc/self/status").read_text()
    return int(next(x for x in status.splitlines() if x.startswith("VmRSS")).split()[1]) >> 10


if __name__ == "__main__":
    main()
