"""Estimates agree with what is allocated."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from remora_agent.engine.child import anonymous_bytes
from remora_agent.engine.ort.kv import KvCache
from remora_agent.engine.ort.packing import pack
from remora_agent.engine.ort.slots import RowSlots
from remora_contract.bundle import QuantSpec
from remora_contract.engine_memory import bank_bytes, engine_bytes, kv_bytes, row_slot_bytes
from tests.agent.engine.conftest import Bench, Case
from tests.agent.engine.portable import FLOAT32, INT4, QWEN2, QWEN3, random_adapter


def test_the_engine_estimate_is_what_the_kernels_read():
    """By hand: two layers of hidden 64, heads 4 + 2 + 2 of 16, intermediate 96, vocab 160."""
    weights = 2 * (64 * 128 + 64 * 64 + 64 * 192 + 96 * 64) + 64 * 160
    assert engine_bytes(QWEN2, FLOAT32) == 4 * weights
    assert engine_bytes(QWEN2, INT4) == weights // 2 + 4 * weights // 32


def test_the_engine_estimate_knows_every_kind_of_weight_and_what_stays_plain():
    head = 64 * 160
    rest = 2 * (64 * 128 + 64 * 64 + 64 * 192 + 96 * 64)
    sizes = {
        QuantSpec("int8"): rest + head + 4 * ((rest + head) // 32),
        QuantSpec("int8", 64, plain=("head",)): rest + 4 * (rest // 64) + 4 * head,
        QuantSpec("int4", 64, zero_points=True, plain=("head",)): (
            rest // 2 + 4 * (rest // 64) + rest // 128 + 4 * head
        ),
        QuantSpec("nvfp4", 16, plain=("head",)): 4 * (rest + head),
    }
    for quant, size in sizes.items():
        assert engine_bytes(QWEN2, replace(FLOAT32, quant=quant)) == size


def test_the_cache_estimate_is_what_the_cache_allocates():
    cache = KvCache(QWEN3, 3, 20)
    allocated = sum(b.array.nbytes for b in cache.view(0, 3).values())
    assert allocated == kv_bytes(QWEN3, 3, 20)


def test_the_bank_estimate_bounds_a_packed_adapter_from_below_by_padding_only():
    packed = pack(QWEN2, ((random_adapter(QWEN2, 1, rank=8), 1.0),))
    assert sum(b.array.nbytes for b in packed.values()) == bank_bytes(QWEN2, 8)
    slots = RowSlots(QWEN2, 4)
    slots.fill([(0, packed), (1, pack(QWEN2, ()))])
    assert sum(b.array.nbytes for b in slots.view(0, 4).values()) == row_slot_bytes(QWEN2, 4, 8)


def test_unused_positions_take_no_memory():
    before = anonymous_bytes(os.getpid())
    cache = KvCache(QWEN2, 8, 1 << 20)
    assert kv_bytes(QWEN2, 8, 1 << 20) > 1 << 30
    assert anonymous_bytes(os.getpid()) - before < 64 << 20
    cache.clear()


def test_closing_gives_the_memory_back(make_bench: Callable[[Case], Bench]):
    bench = make_bench(Case(QWEN2, FLOAT32))
    grown = []
    for _ in range(6):
        engine = bench.open(rows=64)
        for row in range(64):
            engine.prefill(row, np.arange(40), 0)
        engine.close()
        del engine
        gc.collect()
        grown.append(anonymous_bytes(os.getpid()))
    one_cache = kv_bytes(QWEN2, 64, 48)
    assert grown[-1] - grown[1] < 2 * one_cache
