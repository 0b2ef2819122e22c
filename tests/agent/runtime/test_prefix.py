"""Prefixes that are not computed again: the same answers, fewer tokens read, nothing shared that
must not be."""

from dataclasses import replace

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from remora_agent.engine.protocol import KvBlock
from remora_agent.runtime.api import Scoring, Share
from remora_agent.runtime.options import RuntimeOptions
from remora_agent.runtime.prefix_keys import BLOCK, Acting, PrefixKeys
from remora_agent.runtime.prefix_store import PrefixStore
from tests.support.reference_engine import fault
from tests.support.runtime import request

SYSTEM = tuple(i % 200 for i in range(3 * BLOCK))
CONTEXT = 256


def ask(s, name, prompt, count=5, mix=None, **share):
    """The answer, which is always the one that the request gets alone."""
    r = replace(request(name, prompt, count, mix), share=Share(**share))
    heard = s.submit(r).wait()
    assert heard.tokens == s.solo(r)
    return heard.finished.usage.cached_tokens


def prefilled(s):
    return sum(tokens for _, _, tokens in s.engine.calls.prefills)


def test_a_second_prompt_with_the_same_beginning_computes_only_what_is_new(serve):
    s = serve(context=CONTEXT)
    assert ask(s, "first", (*SYSTEM, 7, 8, 9)) == 0
    before = prefilled(s)
    assert ask(s, "second", (*SYSTEM, 50, 51)) == len(SYSTEM)
    assert prefilled(s) - before == 2
    metrics = s.runtime.metrics()
    assert (metrics["prefix_lookups"], metrics["prefix_hits"]) == (2, 1)
    assert metrics["prefix_tokens"] == len(SYSTEM)
    assert metrics["prefix_bytes"] == len(SYSTEM) * s.engine.limits.kv_token_bytes


def test_a_row_that_holds_the_prefix_still_is_used_without_a_copy(serve):
    s = serve(rows=1, context=CONTEXT)
    ask(s, "first", (*SYSTEM, 7))
    assert ask(s, "second", (*SYSTEM, 8)) == len(SYSTEM)
    assert s.engine.calls.writes == []
    ask(s, "other", tuple(range(100, 200)))
    assert ask(s, "third", (*SYSTEM, 9)) == len(SYSTEM)
    assert [(start, n) for _, start, n in s.engine.calls.writes] == [
        (i, BLOCK) for i in range(0, len(SYSTEM), BLOCK)
    ]


def test_an_engine_that_copies_nothing_still_reuses_what_lies_in_its_rows(serve):
    s = serve(rows=1, context=CONTEXT, copies_kv=False)
    ask(s, "first", (*SYSTEM, 7))
    assert ask(s, "second", (*SYSTEM, 8)) == len(SYSTEM)
    ask(s, "other", tuple(range(100, 200)))
    assert ask(s, "third", (*SYSTEM, 9)) == 0


def test_a_conversation_goes_on_from_its_own_answer(serve):
    s = serve(context=CONTEXT)
    first = s.submit(request("one", SYSTEM[:40], 60)).wait()
    history = (*SYSTEM[:40], *first.tokens, 3, 4, 5)
    reused = ask(s, "two", history)
    assert reused == (40 + 60 - 1) // BLOCK * BLOCK  # the last token was never written


def test_the_last_token_of_a_prompt_is_always_computed(serve):
    s = serve(context=CONTEXT)
    assert ask(s, "a", SYSTEM) == 0
    assert ask(s, "b", SYSTEM) == len(SYSTEM) - BLOCK


def test_salts_and_adapters_share_nothing(serve):
    s = serve({"a": 4, "b": 4}, context=CONTEXT)
    kinds = [
        {},
        {"cache_salt": "tenant"},
        {"mix": {"a": 1.0}},
        {"mix": {"a": 0.5}},
        {"mix": {"b": 1.0}},
        {"mix": {"a": 1.0, "b": 1.0}},
        {"mix": {"a": 1.0}, "cache_salt": "tenant"},
    ]
    for i, kind in enumerate(kinds):
        assert ask(s, f"{i}", (*SYSTEM, i), **kind) == 0, kind
    for i, kind in enumerate(kinds):
        assert ask(s, f"again {i}", (*SYSTEM, 99, i), **kind) == len(SYSTEM), kind


def test_clients_and_priorities_share_prefixes(serve):
    s = serve(context=CONTEXT)
    ask(s, "a", (*SYSTEM, 1), client="x")
    assert ask(s, "b", (*SYSTEM, 2), client="y", priority=3) == len(SYSTEM)


def test_before_its_invocation_an_activated_adapter_shares_the_bases_prefix(serve):
    s = serve({"a": 4}, context=CONTEXT, invocations={"a": (250, 251)})
    prompt = (*SYSTEM, 7, 250, 251, 9)
    base = s.submit(request("base", (*SYSTEM, 1), 4)).wait()
    assert base.finished.usage.cached_tokens == 0
    heard = s.submit(request("adapted", prompt, 5, {"a": 1.0})).wait()
    assert heard.finished.usage.cached_tokens == len(SYSTEM)
    fresh = serve({"a": 4}, context=CONTEXT, invocations={"a": (250, 251)})
    assert fresh.submit(request("adapted", prompt, 5, {"a": 1.0})).wait().tokens == heard.tokens


def test_a_request_whose_prompt_is_scored_computes_all_of_it(serve):
    s = serve(context=CONTEXT)
    ask(s, "first", (*SYSTEM, 7))
    scored = replace(request("scored", (*SYSTEM, 7), 4), scoring=Scoring(prompt_top=0))
    assert s.submit(scored).wait().finished.usage.cached_tokens == 0


def test_zero_bytes_turn_reuse_off(serve):
    s = serve(rows=1, context=CONTEXT, options=RuntimeOptions(prefix_bytes=0))
    ask(s, "first", (*SYSTEM, 7))
    assert ask(s, "second", (*SYSTEM, 7)) == 0
    assert s.runtime.metrics()["prefix_lookups"] == 0


def test_copies_stay_within_their_bytes_and_the_oldest_go(serve):
    block = BLOCK * 24 * 8
    s = serve(rows=1, context=CONTEXT, options=RuntimeOptions(prefix_bytes=5 * block))
    for i in range(6):
        ask(s, f"{i}", tuple((i + j) % 200 for j in range(3 * BLOCK + 1)))
    metrics = s.runtime.metrics()
    assert metrics["prefix_bytes"] <= 5 * block and metrics["prefix_evictions"] >= 12
    assert ask(s, "last", tuple((5 + j) % 200 for j in range(3 * BLOCK + 1))) == 3 * BLOCK
    assert ask(s, "oldest", tuple(j % 200 for j in range(3 * BLOCK + 1))) == 0


def test_copies_are_given_up_when_memory_is_short(serve):
    free = [1 << 40]
    s = serve(rows=1, context=CONTEXT, free_bytes=lambda: free[0], clock=Ticks())
    ask(s, "first", (*SYSTEM, 7))
    assert s.runtime.metrics()["prefix_bytes"] > 0
    heard = s.submit(request("running", tuple(range(70)), 30))
    free[0] = 0
    heard.wait()
    assert s.runtime.metrics()["prefix_bytes"] == 0


class Ticks:
    """A clock that moves with every look."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 0.01
        return self.now


def test_a_failed_step_leaves_nothing_that_could_be_reused(serve):
    s = serve(rows=1, context=CONTEXT, copies_kv=False)
    ask(s, "first", (*SYSTEM, 7))

    def spoil():
        s.engine.before_step = lambda: None
        s.engine._states[0] = 1e3
        raise fault()

    s.engine.before_step = spoil
    failed = s.submit(request("fails", (*SYSTEM, 8), 4)).wait()
    assert "backend failed" in str(failed.error)
    assert ask(s, "next", (*SYSTEM, 7)) == 0


def test_a_row_that_a_prompt_without_keys_has_used_is_not_taken_for_what_it_was(serve):
    s = serve(rows=1, context=CONTEXT, copies_kv=False)
    ask(s, "first", (*SYSTEM, 7))
    other = request("scored", tuple(range(100, 220)), 4)
    s.submit(replace(other, scoring=Scoring(prompt_top=0))).wait()
    assert ask(s, "next", (*SYSTEM, 7)) == 0


def test_many_prompts_at_once_read_their_common_beginning_once(serve):
    s = serve(rows=4, context=CONTEXT)
    heard = [s.submit(request(f"{i}", (*SYSTEM, i), 4)) for i in range(4)]
    reused = [h.wait().finished.usage.cached_tokens for h in heard]
    assert sorted(reused) == [0, *[len(SYSTEM)] * 3]
    assert prefilled(s) == len(SYSTEM) + 4


prompts = st.lists(st.sampled_from([0, 1, 2]), min_size=0, max_size=3).flatmap(
    lambda parts: st.integers(1, 40).map(
        lambda n: (*(t for p in parts for t in range(p, p + BLOCK)), *range(50, 50 + n))
    )
)


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(
        st.tuples(prompts, st.sampled_from([{}, {"a": 1.0}, {"a": 0.5}]), st.integers(1, 40)),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 3),
    st.sampled_from([8, 32, 100]),
    st.sampled_from([3, 1000]),
)
def test_whatever_came_before_every_answer_is_the_one_it_gets_alone(
    serve, asked, rows, chunk, blocks
):
    options = RuntimeOptions(prefill_chunk=chunk, prefix_bytes=blocks * BLOCK * 24 * 8)
    s = serve({"a": 4}, rows=rows, context=CONTEXT, options=options)
    sent = [request(f"{i}", p, n, mix) for i, (p, mix, n) in enumerate(asked)]
    for r, heard in [(r, s.submit(r)) for r in sent]:
        assert heard.wait().tokens == s.solo(r)
        assert heard.finished.usage.cached_tokens < len(r.prompt)
    s.runtime.close()


# -- keys and store -------------------------------------------------------------------------


def keys(tokens, acting=(), salt="", engine="e"):
    return list(PrefixKeys(engine, salt, acting).of(tokens, len(tokens) // BLOCK))


def test_a_key_depends_on_everything_before_it():
    tokens = list(range(3 * BLOCK))
    changed = [99, *tokens[1:]]
    assert not set(keys(tokens)) & set(keys(changed))
    assert keys(tokens)[:2] == keys([*tokens[: 2 * BLOCK], *range(BLOCK)])[:2]


def test_engine_salt_and_mix_change_every_key():
    tokens = list(range(BLOCK))
    variants = [
        keys(tokens),
        keys(tokens, salt="x"),
        keys(tokens, engine="f"),
        keys(tokens, [Acting("a", 1.0, 0)]),
        keys(tokens, [Acting("a", 0.5, 0)]),
        keys(tokens, [Acting("a", 1.0, 1)]),
        keys(tokens, [Acting("a", 1.0, 0), Acting("b", 1.0, 0)]),
    ]
    assert len({v[0] for v in variants}) == len(variants)


def test_an_adapter_counts_from_the_block_in_which_it_begins():
    tokens = list(range(3 * BLOCK))
    base, adapted = keys(tokens), keys(tokens, [Acting("a", 1.0, BLOCK + 5)])
    assert adapted[0] == base[0]
    assert adapted[1] != base[1] and adapted[2] != base[2]


def test_keys_grow_with_the_sequence():
    tokens = list(range(3 * BLOCK))
    growing = PrefixKeys("e", "", ())
    growing.of(tokens[:BLOCK], 1)
    assert list(growing.of(tokens, 3)) == keys(tokens)


def block(size=10):
    return KvBlock(1, (np.zeros(size, np.uint8),))


def test_the_end_of_a_chain_leaves_before_its_beginning():
    store, chain = PrefixStore(50), [b"1", b"2", b"3"]
    for key in chain:
        store.put(key, block(), chain)
    store.used(chain)
    for other in (b"x", b"y", b"z"):
        store.put(other, block(), [])
    assert b"3" not in store and b"1" in store and b"2" in store and store.bytes == 50


def test_a_chain_longer_than_the_cap_keeps_its_beginning():
    store, chain = PrefixStore(30), [bytes([i]) for i in range(5)]
    assert [store.put(key, block(), chain) for key in chain] == [True, True, True, False, False]
    assert store.evictions == 0


def test_a_block_larger_than_the_cap_is_not_taken_and_nothing_leaves_for_it():
    store = PrefixStore(30)
    store.put(b"1", block(), [])
    assert not store.put(b"2", block(31), [b"1"]) and b"1" in store
