"""What a device tells of its disk, and what a release's engine takes of its memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_contract.bundle import BundleFile
from remora_contract.digests import digest_bytes
from remora_contract.engine_memory import bank_bytes, engine_bytes, kv_bytes, row_slot_bytes
from remora_contract.held import MAX_HELD, Held, bounded
from remora_contract.memory_need import (
    FACT,
    Sizing,
    memory_facts,
    memory_need_refusals,
    peak_memory_bytes,
)
from tests.support.repository import make_bundle

DIGESTS = st.sets(st.integers(0, 9).map(lambda n: digest_bytes(b"%d" % n)))
HELD = st.builds(lambda k, ls: Held(bounded(k), bounded(ls - k)), DIGESTS, DIGESTS)


@given(HELD, DIGESTS)
def test_what_stays_and_what_is_freed_are_apart_and_all_there_is(held, wanted):
    stays, freed = held.after(wanted), held.freed(wanted)
    assert stays | freed == {*held.kept, *held.loose}
    assert not stays & freed
    assert not freed & wanted, "nothing that the new release needs is dropped"


@given(HELD, HELD)
def test_a_fingerprint_stands_for_one_state_of_the_disk(one, other):
    assert (one.fingerprint == other.fingerprint) == (one == other)
    assert 0 <= one.fingerprint < 1 << 64


def test_nothing_held_looks_like_an_agent_that_does_not_say():
    assert Held().fingerprint == 0


def test_more_than_the_bound_is_cut_by_who_tells_and_refused_by_who_hears():
    many = [digest_bytes(b"%d" % n) for n in range(MAX_HELD + 1)]
    assert len(bounded(many)) == MAX_HELD
    with pytest.raises(ValueError, match="256"):
        Held(kept=tuple(many))


BUNDLE = make_bundle((BundleFile("model.onnx", 1, digest_bytes(b"g")),))
FACTS = {**memory_facts(BUNDLE), "context": BUNDLE.graph.context}
SIZING = Sizing("onnxruntime", rows=4, context=None, floor_bytes=1000, prefill="plain")


def test_the_peak_is_what_the_engine_plans_for_part_by_part():
    decoder, graph = BUNDLE.decoder, BUNDLE.graph
    rank = graph.max_bank_rank
    assert peak_memory_bytes(FACTS, SIZING, 1 << 40) == (
        engine_bytes(decoder, graph)
        + kv_bytes(decoder, 4, graph.context)
        + bank_bytes(decoder, rank, graph=graph)
        + row_slot_bytes(decoder, 4, rank)
        + 1000
    )


@given(st.integers(0, 1 << 20), st.integers(1, 32), st.integers(1, 64))
def test_more_memory_never_refuses_and_a_refusal_never_peaks_below_it(memory, rows, context):
    sizing = Sizing("onnxruntime", rows, context, 1000, "plain")
    refused = bool(memory_need_refusals(FACTS, sizing, memory)) if memory else False
    if refused:
        peak = peak_memory_bytes(FACTS, sizing, memory)
        assert peak is not None and peak > memory
        assert memory_need_refusals(FACTS, sizing, memory - 1) or memory == 1
    else:
        assert not memory_need_refusals(FACTS, sizing, memory + 1 if memory else 0)


def test_int8_prompts_count_where_they_are_asked_for_or_fit():
    plain = peak_memory_bytes(FACTS, SIZING, 1 << 40)
    more = FACTS[FACT]["int8_prefill"]
    auto = Sizing("onnxruntime", 4, None, 1000, "auto")
    always = Sizing("onnxruntime", 4, None, 1000, "int8")
    assert peak_memory_bytes(FACTS, auto, plain + more) == plain + more
    assert peak_memory_bytes(FACTS, auto, plain + more - 1) == plain
    assert peak_memory_bytes(FACTS, always, 1) == plain + more


@pytest.mark.parametrize(
    ("facts", "sizing"),
    [
        ({}, SIZING),
        (FACTS, None),
        (FACTS, Sizing("tensorrt", 4, None, 1000, "plain")),
        ({FACT: {"weights": "many"}}, SIZING),
        ({FACT: 7}, SIZING),
    ],
)
def test_what_is_not_known_is_neither_shown_nor_refused(facts, sizing):
    assert peak_memory_bytes(facts, sizing, 1) is None
    assert memory_need_refusals(facts, sizing, 1) == []
