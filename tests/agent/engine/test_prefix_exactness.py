"""Keys and values that are put back instead of computed: bit for bit what computing gives when the
chunks end alike, in every family's way of attending, with and without adapters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from remora_agent.bank.weights import AdapterWeights
from remora_agent.engine.protocol import Engine, MixEntry, RowStep
from remora_agent.runtime.model_runtime import ModelRuntime
from remora_agent.runtime.options import RuntimeOptions
from remora_agent.runtime.prefix_keys import BLOCK
from remora_contract.bundle import load_bundle
from remora_contract.digests import digest_bytes
from remora_contract.errors import PromptTooLong, RequestInvalid
from tests.agent.engine.conftest import Bench
from tests.agent.engine.portable import random_adapter
from tests.agent.engine.test_family_engines import adapter_tensors, export, opened
from tests.support.runtime import Listener, request

PREFIX, PROMPT, COUNT = 2 * BLOCK, 80, 12
CLOSE = 2e-5
# Plain, sliding windows by layer, windows everywhere, a longrope that is outgrown.
FORMS = ("llama", "gemma3_text", "ministral3", "phi3")


def ids(tokens) -> np.ndarray:
    return np.array(tokens, np.int64)


def test_a_block_put_into_another_row_gives_the_bits_that_computing_it_gives(
    bench: Bench, engine: Engine
):
    prompt = ids([*range(3, 15)])
    engine.prefill(0, prompt[:8], 0)
    engine.prefill(2, prompt[:8], 0)
    want = engine.prefill(2, prompt[8:], 8)
    # Of the row itself: how many rows a step computes may depend on which are asked for.
    then = engine.decode([RowStep(2, 40, 12)])[0]
    block = engine.read_kv(0, 0, 8)
    assert (block.tokens, block.bytes) == (8, 8 * engine.limits.kv_token_bytes)
    for row in (0, 2):  # a copy does not change with its row
        engine.prefill(row, ids([90, 91, 92]), 0)
    engine.write_kv(2, 0, block)
    assert np.array_equal(engine.prefill(2, prompt[8:], 8), want)
    assert np.array_equal(engine.decode([RowStep(2, 40, 12)])[0], then)


def test_blocks_in_pieces_give_the_same_as_one(engine: Engine):
    prompt = ids([*range(3, 15)])
    engine.prefill(1, prompt[:9], 0)
    want = engine.prefill(1, prompt[9:], 9)
    for start, stop in [(0, 4), (4, 5), (5, 9)]:
        engine.write_kv(3, start, engine.read_kv(1, start, stop))
    assert np.array_equal(engine.prefill(3, prompt[9:], 9), want)


def test_rows_beside_keep_what_they_hold(engine: Engine):
    for row in range(4):
        engine.prefill(row, ids([row + 1, row + 2, row + 3]), 0)
    before = [engine.read_kv(row, 0, 3).arrays[0] for row in (1, 3)]
    engine.write_kv(2, 0, engine.read_kv(0, 0, 3))
    after = [engine.read_kv(row, 0, 3).arrays[0] for row in (1, 3)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_what_a_row_does_not_hold_is_neither_read_nor_written_behind(engine: Engine):
    engine.prefill(0, ids([1, 2, 3]), 0)
    block = engine.read_kv(0, 0, 3)
    for start, stop in [(0, 4), (2, 2), (-1, 2)]:
        with pytest.raises(RequestInvalid):
            engine.read_kv(0, start, stop)
    with pytest.raises(RequestInvalid):
        engine.write_kv(1, 1, block)
    with pytest.raises(RequestInvalid):
        engine.write_kv(9, 0, block)
    full = engine.limits.context
    engine.prefill(1, ids([7] * (full - 1)), 0)
    with pytest.raises(PromptTooLong):
        engine.write_kv(1, full - 1, block)


@pytest.mark.parametrize("form", FORMS)
def test_a_family_continues_a_copied_prefix_as_a_computed_one(tmp_path: Path, form: str):
    _, bundle = export(tmp_path, form)
    described, engine = load_bundle(bundle), opened(tmp_path, bundle)
    tensors = adapter_tensors(described)
    mix = (MixEntry(engine.add_adapter(AdapterWeights(digest_bytes(b"a"), tensors)), 0.7),)
    tokens = np.random.default_rng(2).integers(0, described.decoder.vocab, PROMPT + COUNT)
    for which in ((), mix):
        engine.prefill(0, tokens[:PREFIX], 0, which, PROMPT)
        block = engine.read_kv(0, 0, PREFIX)
        engine.write_kv(2, 0, block)
        logits = [engine.prefill(row, tokens[PREFIX:PROMPT], PREFIX, which) for row in (0, 2)]
        assert np.array_equal(*logits)
        for at in range(PROMPT, PROMPT + COUNT):
            steps = [RowStep(row, int(tokens[at]), at, which) for row in (0, 2)]
            both = engine.decode(steps)
            assert np.abs(both[0] - both[1]).max() <= CLOSE
    engine.close()


@pytest.mark.parametrize("form", FORMS)
def test_a_runtime_with_prefixes_answers_as_one_without(tmp_path: Path, form: str):
    """Greedy tokens, over shared beginnings and a conversation, past windows and ropes."""
    _, bundle = export(tmp_path, form)
    random = np.random.default_rng(3)
    system = tuple(map(int, random.integers(0, load_bundle(bundle).decoder.vocab, PREFIX)))
    ends = [tuple(map(int, random.integers(0, 90, n))) for n in (1, 5, 16)]
    answers = {}
    for size in (0, 1 << 30):
        engine = opened(tmp_path, bundle)
        options = RuntimeOptions(prefill_chunk=BLOCK, prefix_bytes=size)
        runtime = ModelRuntime.open(engine, load_bundle(bundle), bundle, options=options)
        heard = [ask(runtime, f"{i}", system + end) for i, end in enumerate(ends)]
        turn = (*system, *ends[0], *heard[0].tokens, 5, 6)
        heard.append(ask(runtime, "turn", turn))
        heard.append(ask(runtime, "turn again", turn))
        answers[size] = [h.tokens for h in heard]
        reused = [h.finished.usage.cached_tokens for h in heard]
        runtime.close()
        assert reused == ([0, *[PREFIX] * 4] if size else [0] * 5)
    assert answers[0] == answers[1 << 30]


def ask(runtime: ModelRuntime, name: str, prompt: tuple[int, ...]) -> Listener:
    listener = Listener()
    runtime.submit(request(name, prompt, COUNT), listener)
    return listener.wait(60)


def test_a_copied_prefix_with_an_adapter_that_begins_inside_the_prompt(
    bench: Bench, engine: Engine
):
    mix = (MixEntry(engine.add_adapter(random_adapter(bench.spec, seed=3)), 1.0),)
    prompt = ids([*range(3, 15)])
    engine.prefill(0, prompt[:4], 0)
    shared = engine.read_kv(0, 0, 4)
    engine.prefill(0, prompt[4:8], 4)
    want = engine.prefill(0, prompt[8:], 8, mix)
    engine.write_kv(1, 0, shared)
    engine.prefill(1, prompt[4:8], 4)
    assert np.array_equal(engine.prefill(1, prompt[8:], 8, mix), want)
