"""`python -m tests.agent.engine.ort_memory_child BUNDLE ENGINE`: an engine in an address space
that holds no long step. Prints one JSON object. A child, because of what the limit would do to
whatever else runs."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from remora_agent.engine.cache import read_entry
from remora_agent.engine.opening import EngineOptions, load_engine
from remora_agent.engine.protocol import Engine, MixEntry, RowStep
from remora_contract.bundle import Bundle, load_bundle
from remora_contract.errors import RemoraError
from tests.agent.engine.portable import random_adapter

ROOM = 16 << 20  # bytes; a long step of the test's model takes several times as much
PROMPT = np.array([3, 4, 5, 6], np.int64)


def limit_memory() -> None:
    """To what is taken now, and `ROOM`."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, most))


def step(engine: Engine, handle: int) -> np.ndarray:
    """Of row 0 with an adapter, whose prompt has been read."""
    mix = (MixEntry(handle, 1.0),)
    return engine.decode([RowStep(0, 9, len(PROMPT), mix), RowStep(2, 9, len(PROMPT))]).copy()


def refusal(call: Callable[..., object], bundle: Bundle) -> list[object]:
    """Of a prompt as long as the context, in row 1."""
    try:
        call(1, np.arange(bundle.graph.context) % bundle.decoder.vocab, 0)
    except RemoraError as e:
        return [type(e).__name__, str(e), getattr(e, "retry_after_s", None)]
    return ["", "it was answered", None]


def main() -> None:
    bundle_dir, entry_dir = map(Path, sys.argv[1:])
    bundle = load_bundle(bundle_dir)
    engine = load_engine(read_entry(entry_dir), bundle, EngineOptions(rows=3, threads=1))
    handle = engine.add_adapter(random_adapter(bundle.decoder, 1))
    engine.prefill(0, PROMPT, 0, (MixEntry(handle, 1.0),))
    engine.prefill(2, PROMPT, 0)
    before = step(engine, handle)
    limit_memory()
    refused = [refusal(call, bundle) for call in (engine.prefill, engine.embed)]
    after = step(engine, handle)
    short = engine.prefill(1, PROMPT, 0)
    same = np.array_equal(short, engine.prefill(2, PROMPT, 0))
    print(json.dumps({"refused": refused, "same": bool(np.array_equal(before, after)) and same}))


if __name__ == "__main__":
    main()
