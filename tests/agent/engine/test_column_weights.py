"""The weights of int8 prompts are those of the plain form, to half a step."""

from __future__ import annotations

import numpy as np
import pytest

from remora_agent.engine.ort import column_weights
from remora_agent.engine.ort.column_weights import BlockWeight, by_column
from remora_agent.engine.ort.saturation import signed_saturates


def _weight(bits: int, block: int, k: int, n: int, zeros: bool) -> tuple[BlockWeight, np.ndarray]:
    """MatMulNBits' form, and its numbers [n, k] by plain arithmetic."""
    rng, blocks = np.random.default_rng(bits), -(-k // block)
    codes = rng.integers(0, 1 << bits, (n, blocks * block)).astype(np.uint8)
    scales = rng.uniform(0.01, 1.0, (n, blocks)).astype(np.float32)
    zero = rng.integers(0, 1 << bits, (n, blocks)).astype(np.uint8)
    middle = np.repeat(zero if zeros else np.full_like(zero, 1 << (bits - 1)), block, axis=1)
    values = (codes.astype(np.float32) - middle) * np.repeat(scales, block, axis=1)
    packed_zero = zero
    if bits == 4:
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
        padded = np.pad(zero, ((0, 0), (0, blocks % 2)))
        packed_zero = padded[:, 0::2] | (padded[:, 1::2] << 4)
    form = codes.reshape(n, blocks, -1)
    packed = packed_zero.reshape(-1) if zeros else None
    return BlockWeight(form, scales, packed, bits, block, k), values[:, :k]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    ("bits", "block", "k", "zeros"),
    [
        (4, 32, 96, False),
        (4, 32, 96, True),
        (4, 16, 32, True),
        (8, 32, 96, False),
        (8, 32, 70, True),
    ],
)
def test_every_number_moves_by_half_a_step_at_most(
    monkeypatch: pytest.MonkeyPatch, bits: int, block: int, k: int, zeros: bool, signed: bool
):
    monkeypatch.setattr(column_weights, "_ROWS_AT_ONCE", 7)  # the last part is smaller
    weight, values = _weight(bits, block, k, 24, zeros)
    codes, scale = by_column(weight, signed)
    assert codes.dtype == (np.int8 if signed else np.uint8) and codes.shape == (k, 24)
    centred = codes.astype(np.float32) - (0 if signed else 128)
    assert np.abs(centred).max() == 127
    error = np.abs(centred * scale - values.T)
    assert (error <= 0.5001 * scale + 1e-6).all()
    assert scale == pytest.approx(np.abs(values).max(axis=1) / 127)


def test_a_column_of_zeros_stays_zero():
    weight, _ = _weight(4, 32, 32, 3, False)
    weight.codes[1] = 0x88
    codes, scale = by_column(weight, signed=True)
    assert not codes[:, 1].any() and np.isfinite(scale).all()


def test_whether_sums_saturate_is_a_fact_of_this_machine():
    assert signed_saturates() is signed_saturates()
