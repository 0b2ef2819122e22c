"""Quantization and casts: exact where they must be, close where they may not be."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from remora_build.quantize import Int4, dequantize, pack_nibbles, problem, quantize, unpack_nibbles

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(2) as executor:
        yield executor


def absmax_error(weight: np.ndarray, block: int) -> float:
    """What plain max|w| / 7 rounding loses."""
    blocks = weight.reshape(-1, block, weight.shape[1])
    scales = np.abs(blocks).max(axis=1) / 7
    codes = np.rint(blocks / scales[:, None]).astype(np.int8).reshape(weight.shape)
    return error(weight, Int4(codes, scales), block)


def error(weight: np.ndarray, packed: Int4, block: int) -> float:
    return float(np.sqrt(((dequantize(packed, block) - weight) ** 2).mean()))


@pytest.mark.parametrize(("block", "gain"), [(32, 0.93), (128, 0.91)])
@pytest.mark.parametrize("draw", ["standard_normal", "laplace"])
def test_rounding_loses_less_than_absmax(pool, block, gain, draw):
    rng = np.random.default_rng(0)
    weight = getattr(rng, draw)(size=(1024, 96)).astype(np.float32)
    assert error(weight, quantize(weight, block, pool), block) < gain * absmax_error(weight, block)


def test_no_block_is_rounded_worse_than_half_a_step_of_its_largest_weight(pool):
    weight = np.random.default_rng(1).standard_normal((256, 64)).astype(np.float32)
    packed = quantize(weight, 32, pool)
    worst = np.abs(dequantize(packed, 32) - weight).reshape(8, 32, 64).max(axis=1)
    assert (worst <= 0.18 * np.abs(weight).reshape(8, 32, 64).max(axis=1)).all()


@given(
    hnp.arrays(
        np.float32,
        (64, 4),
        elements=st.floats(-100, 100, width=32, allow_subnormal=False),
    )
)
def test_codes_and_scales_stay_in_range(weight):
    with ThreadPoolExecutor(1) as executor:
        packed = quantize(weight, 32, executor)
    assert packed.codes.min() >= -8
    assert packed.codes.max() <= 7
    assert (packed.scales > 0).all()
    assert np.isfinite(packed.scales).all()


def test_a_block_of_zeros_stays_zero(pool):
    packed = quantize(np.zeros((32, 2), np.float32), 32, pool)
    assert not dequantize(packed, 32).any()
    assert (packed.scales > 0).all()


def test_weights_that_are_codes_times_a_scale_come_back_exactly(pool):
    codes = np.random.default_rng(2).integers(-7, 8, (32, 8))
    codes[0] = 7
    weight = (codes * np.float32(0.25)).astype(BFLOAT16)
    packed = quantize(weight, 32, pool)
    assert np.abs(dequantize(packed, 32) - weight.astype(np.float32)).max() < 1e-6


@given(
    hnp.arrays(
        np.int8, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=st.integers(-8, 7)
    )
)
def test_unpacking_is_the_inverse_of_packing(codes):
    packed = pack_nibbles(codes)
    assert packed.nbytes == (codes.size + 1) // 2
    assert (unpack_nibbles(packed)[: codes.size] == codes.reshape(-1)).all()


def test_packing_puts_the_first_code_in_the_low_half():
    assert pack_nibbles(np.array([[1, -8]], np.int8)).tolist() == [0x81]


@pytest.mark.parametrize("source", [BFLOAT16, np.dtype(np.float32)])
def test_values_are_refused_exactly_when_float16_would_round_them_to_infinity(source):
    finite = np.array([65504.0, -65280.0, 0.0], np.float32).astype(source)
    too_big = np.array([0.0, -65536.0], np.float32).astype(source)
    if source == np.float32:
        assert problem(finite, np.dtype(np.float16)) is None
    assert "float16" in str(problem(too_big, np.dtype(np.float16)))
    assert problem(too_big, np.dtype(np.float32)) is None


def test_the_largest_bfloat16_below_the_limit_is_kept():
    values = np.array([65280.0], np.float32).astype(BFLOAT16)
    assert problem(values, np.dtype(np.float16)) is None
    assert np.isfinite(values.astype(np.float16)).all()


@pytest.mark.parametrize("source", [BFLOAT16, np.dtype(np.float16), np.dtype(np.float32)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_found_in_every_dtype(source, bad):
    values = np.array([1.0, bad, 2.0]).astype(source)
    assert "NaN" in str(problem(values, np.dtype(np.float32)))
