"""The runtime on an emulated GPU: requests that arrive while others decode get the same answers
whether their prompts are read beside the steps or between them."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import pytest

from remora_agent.engine.cache import CacheEntry
from remora_agent.runtime.api import Finished
from remora_contract.bundle import load_bundle
from tests.agent.engine.portable import QWEN2, random_bundle
from tests.agent.runtime.manual import manual_runtime
from tests.support import trt_engines
from tests.support.runtime import request
from tests.support.trt_engines import Bench

PROMPTS = {
    f"r{i}": tuple(range(3 + 5 * i, 3 + 5 * i + length))
    for i, length in enumerate((4, 17, 9, 21, 6))
}
DRAWN = 9


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CacheEntry]:
    directory = random_bundle(tmp_path_factory.mktemp("runtime") / "bundle", QWEN2)
    return directory, trt_engines.build(directory, directory.parent / "engine", shortlist=40)


def answers(bench: Bench, overlap: str) -> dict[str, tuple[int, ...]]:
    """A request every few steps; four rows for five of them."""
    engine = bench.open(overlap=overlap)
    heard: dict[str, list] = {name: [] for name in PROMPTS}
    bundle = load_bundle(bench.bundle_dir)
    with manual_runtime(engine, bundle, bench.bundle_dir, clock=lambda: 0.0) as (runtime, loop, _):
        for name, prompt in PROMPTS.items():
            runtime.submit(request(name, prompt, DRAWN), heard[name].append)
            for _ in range(3):
                loop.step()
        for _ in range(150):
            loop.step()
    assert all(isinstance(events[-1], Finished) for events in heard.values())
    return {
        n: tuple(t for e in events for t in getattr(e, "token_ids", ()))
        for n, events in heard.items()
    }


@pytest.mark.parametrize("asks", [2, 3, 5])
def test_answers_do_not_depend_on_what_ran_beside_them(entry: tuple[Path, CacheEntry], asks: int):
    beside, alone = Bench(*entry), Bench(*entry)
    beside.cuda.queries = cycle([*[False] * (asks - 1), True])
    found = answers(beside, "auto")
    assert found == answers(alone, "off")
    assert all(len(tokens) == DRAWN for tokens in found.values())
    assert beside.cuda.order.overlapped > alone.cuda.order.overlapped  # of loading
