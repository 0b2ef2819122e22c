"""Composed mixes as requests make them: any weights, many at a time, bounded memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import numpy as np
import pytest

from remora_agent.engine.ort import bank as bank_module
from remora_agent.engine.ort import names
from remora_agent.engine.ort.bank import Bank
from remora_agent.engine.ort.packing import pack
from remora_agent.engine.protocol import Mix, MixEntry, RowStep
from tests.agent.engine.conftest import Bench, Case
from tests.agent.engine.portable import FLOAT32, QWEN2, random_adapter
from tests.agent.engine.test_conformance_rows import ids

A, B = random_adapter(QWEN2, 1, rank=4), random_adapter(QWEN2, 2, rank=6, projections=("q", "down"))


@pytest.fixture
def bank() -> Bank:
    bank = Bank(QWEN2, 64, rows=12)
    assert (bank.add(A), bank.add(B)) == (1, 2)
    return bank


def mix(a: float, b: float) -> Mix:
    return (MixEntry(1, a), MixEntry(2, b))


def same(packed, wanted) -> bool:
    return packed.keys() == wanted.keys() and all(
        np.array_equal(packed[n].array, wanted[n].array) for n in wanted
    )


def test_mixes_that_differ_in_weights_alone_share_their_a_factors(bank: Bank):
    first, second = bank.packed(mix(0.5, 0.5)), bank.packed(mix(-2.0, 0.0))
    name_a, name_b = names.slot_a(0, "qkv"), names.slot_b(0, "q")
    assert np.shares_memory(first[name_a].array, second[name_a].array)
    assert not np.shares_memory(first[name_b].array, second[name_b].array)
    assert same(first, pack(QWEN2, ((A, 0.5), (B, 0.5))))
    assert same(second, pack(QWEN2, ((A, -2.0), (B, 0.0))))


def test_another_order_of_the_adapters_is_packed_in_that_order(bank: Bank):
    bank.packed(mix(0.5, 0.25))
    turned = bank.packed(mix(0.5, 0.25)[::-1])
    assert same(turned, pack(QWEN2, ((B, 0.25), (A, 0.5))))


def test_one_adapter_with_another_weight_shares_with_itself(bank: Bank):
    half, whole = bank.packed((MixEntry(1, 0.5),)), bank.packed((MixEntry(1, 1.0),))
    name = names.slot_a(1, "down")
    assert np.shares_memory(half[name].array, whole[name].array)
    assert same(half, pack(QWEN2, ((A, 0.5),)))


def test_a_step_of_as_many_mixes_as_rows_packs_nothing_anew(bank: Bank):
    mixes = [mix(1.0 + row, 0.5) for row in range(12)]
    first = [bank.packed(m) for m in mixes]
    again = [bank.packed(m) for m in mixes]
    assert all(x is y for x, y in zip(first, again, strict=True))


def test_weights_without_end_leave_a_bounded_number_of_mixes(bank: Bank):
    first = bank.packed(mix(0.0, 1.0))
    for i in range(12):
        bank.packed(mix(1.0 + i, 1.0))
    assert bank.packed(mix(0.0, 1.0)) is not first
    assert bank.packed((MixEntry(1, 1.0),)) is bank.packed((MixEntry(1, 1.0),))


def test_removing_an_adapter_takes_every_mix_with_it(bank: Bank):
    for weight in (0.5, 0.75):
        bank.packed(mix(weight, 1.0))
    gone = bank.remove(2)
    assert len(gone) == 3  # its own and the two composed
    kept = bank.packed((MixEntry(1, 1.0),))
    assert same(kept, pack(QWEN2, ((A, 1.0),)))


def test_an_engine_lets_go_of_the_mixes_it_no_longer_keeps(
    make_bench: Callable[[Case], Bench], monkeypatch: pytest.MonkeyPatch
):
    """Neither bindings of row ranges nor row slots keep arrays of weights nobody asks for now."""
    made: list[weakref.ref] = []
    whole = bank_module.pack

    def watched(*arguments):
        packed = whole(*arguments)
        made.append(weakref.ref(packed[names.slot_b(0, "q")].array))
        return packed

    engine = make_bench(Case(QWEN2, FLOAT32)).open()
    monkeypatch.setattr(bank_module, "pack", watched)
    ha, hb = engine.add_adapter(A), engine.add_adapter(B)
    for turn in range(40):
        mixes = [
            (MixEntry(ha, 1.0 + turn), MixEntry(hb, 0.1 + row * (turn % 3))) for row in range(4)
        ]
        for row, chosen in enumerate(mixes):
            engine.prefill(row, ids([1, 2, 3]), 0, chosen)
        first, count = turn % 3, 1 + turn % 4
        rows = range(first, min(4, first + count))
        engine.decode([RowStep(row, 5, 3, mixes[row]) for row in rows])
    gc.collect()
    assert len(made) > 100
    # Each adapter alone, and the composed ones that are kept.
    assert sum(array() is not None for array in made) <= 2 + 8
    engine.close()
