"""A plan that does not fit names every part, and its advice is true."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_contract.errors import RequestInvalid
from remora_contract.memory_plan import MemoryPlan, Shape, plan_refusals

MIB = 1 << 20
PLAN = MemoryPlan(
    1000 * MIB,
    800 * MIB,
    160 * MIB,
    100 * MIB,
    8 * MIB,
    256 * MIB,
    overlap=40 * MIB,
    pinned=24 * MIB,
    step=4 * MIB,
)
SHAPE = Shape(rows=8, context=4096, bank_rank=64)


def test_a_plan_that_fits_to_the_byte_is_taken():
    assert plan_refusals(PLAN, SHAPE, PLAN.total) == []
    assert len(plan_refusals(PLAN, SHAPE, PLAN.total - 1)) == 1


def test_a_refusal_names_every_part_and_what_to_change():
    (refusal,) = plan_refusals(PLAN, SHAPE, PLAN.total - 50 * MIB)
    for part, _ in PLAN.table():
        assert part in refusal.need
    for setting in ("rows 7 instead of 8", "context", "a bank of rank 44 instead of 64"):
        assert setting in refusal.need


def test_weights_that_are_too_large_are_said_to_be():
    (refusal,) = plan_refusals(replace(PLAN, bank=0), replace(SHAPE, bank_rank=0), 900 * MIB)
    assert "quantize" in refusal.need


@given(st.integers(1, 1 << 30), st.integers(1, 64))
def test_the_rows_that_are_advised_fit(excess, rows):
    plan, shape = replace(PLAN, kv=rows * 100 * MIB, logits=0), replace(SHAPE, rows=rows)
    (refusal,) = plan_refusals(plan, shape, plan.total - excess)
    if advised := re.search(r"rows (\d+) instead", refusal.need):
        smaller = replace(plan, kv=int(advised[1]) * 100 * MIB)
        assert plan_refusals(smaller, shape, plan.total - excess) == []


def test_a_negative_part_is_a_mistake():
    with pytest.raises(RequestInvalid, match="bank"):
        replace(PLAN, bank=-1)
