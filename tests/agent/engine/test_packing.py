"""Factors as an engine binds them: converted to the bit, in few blocks, none held too long."""

from __future__ import annotations

import gc
import itertools
import weakref
from dataclasses import replace

import numpy as np
import pytest

from remora_agent.bank.weights import AdapterWeights
from remora_agent.engine.ort import names
from remora_agent.engine.ort.packing import pack, packed_views
from remora_contract.targets import AdapterTarget
from tests.agent.engine.portable import QWEN2, random_adapter

Q = AdapterTarget(0, "q")
DOWN = AdapterTarget(1, "down")


def halves(count: int, start: int) -> np.ndarray:
    """Finite float16 numbers, beginning with the `start`th; all of them, subnormal ones and both
    zeros too, in 63,488."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    finite = bits[(bits & 0x7C00) != 0x7C00].view(np.float16)
    return finite[np.arange(start, start + count) % finite.size]


@pytest.mark.parametrize("start", range(0, 63_488, 62 * 16))
def test_every_finite_half_becomes_the_same_number(start: int):
    """In A, which stands in strided columns, and in B."""
    a, b = halves(64 * 16, start).reshape(64, 16), halves(16 * 64, start + 3).reshape(16, 64)
    packed = pack(QWEN2, ((AdapterWeights("sha256:x", {Q: (a, b)}), 1.0),))
    slot_a = packed[names.slot_a(0, "qkv")].array[0, :, :16]
    slot_b = packed[names.slot_b(0, "q")].array[0]
    for made, source in ((slot_a, a), (slot_b, b)):
        wanted = source.astype(np.float32)
        np.testing.assert_array_equal(made.view(np.uint32), wanted.view(np.uint32))


def test_float16_and_float32_adapters_and_views_of_strides_pack_alike():
    weights = random_adapter(QWEN2, 3, rank=5)
    half = {
        t: (a.astype(np.float16), b.astype(np.float16)) for t, (a, b) in weights.tensors.items()
    }
    single = {
        t: (np.asfortranarray(a, np.float32), np.asfortranarray(b, np.float32))
        for t, (a, b) in half.items()
    }
    turned = {t: (np.asfortranarray(a), np.asfortranarray(b)) for t, (a, b) in half.items()}
    packs = [pack(QWEN2, ((replace(weights, tensors=t), 0.75),)) for t in (half, single, turned)]
    for name, buffer in packs[0].items():
        for other in packs[1:]:
            np.testing.assert_array_equal(buffer.array, other[name].array)


def test_a_mix_takes_two_blocks_of_memory_with_every_array_on_its_own_cache_lines():
    packed = pack(QWEN2, ((random_adapter(QWEN2, 1, rank=5), 1.0),))
    arrays = [buffer.array for buffer in packed.values()]
    assert len({id(_memory(a)) for a in arrays}) == 2
    assert all(a.ctypes.data % 64 == 0 for a in arrays)
    spans = sorted((a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


def test_a_mix_that_shares_a_factors_does_not_hold_the_other_ones_b_factors():
    weights = random_adapter(QWEN2, 1)
    first = pack(QWEN2, ((weights, 0.5),))
    second = pack(QWEN2, ((weights, 0.25),), first)
    gone = weakref.ref(_memory(first[names.slot_b(0, "q")].array))
    kept = weakref.ref(_memory(first[names.slot_a(0, "qkv")].array))
    del first
    gc.collect()
    assert gone() is None and kept() is not None
    assert second[names.slot_a(0, "qkv")].array.any()


def test_views_of_a_packed_adapter_are_its_factors_in_that_memory():
    weights = random_adapter(QWEN2, 1, rank=5)
    packed = pack(QWEN2, ((weights, 1.0),))
    views = packed_views(weights, packed)
    for target, (a, b) in weights.tensors.items():
        np.testing.assert_array_equal(views[target][0], a)
        np.testing.assert_array_equal(views[target][1], b)
    assert np.shares_memory(views[DOWN][0], packed[names.slot_a(1, "down")].array)


def _memory(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
