"""Tables of the rotary embedding, rounded where transformers rounds them. Pure.

    inv_freq[i] = theta^(-2i / d)    cos[p, i] = cos(p * inv_freq[i])    sin likewise

Powers, cosines and sines are taken in double and then rounded to float32, so that the tables do not
depend on which vector routines numpy picked for this processor; the product p * inv_freq is
float32, as in the models' own code.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from remora_contract.bundle import RopeSpec


def tables(
    rope: RopeSpec, head_dim: int, context: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin, both [context, head_dim / 2]."""
    frequency = inverse_frequencies(rope, head_dim).astype(np.float32)
    positions = np.arange(context, dtype=np.float32)
    angle = (positions[:, None] * frequency).astype(np.float64)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> NDArray[np.float64]:
    """[head_dim / 2], radians a token."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    plain = (1.0 / rope.theta**exponent).astype(np.float32).astype(np.float64)
    return plain if rope.scaling == "none" else _llama3(rope, plain)


def _llama3(rope: RopeSpec, plain: NDArray[np.float64]) -> NDArray[np.float64]:
    """Long waves are stretched by `factor`, short ones kept, a smooth ramp between."""
    numbers = (rope.factor, rope.low_freq_factor, rope.high_freq_factor, rope.original_context)
    factor, low, high, original = (float(x) for x in numbers if x is not None)
    turns = original * plain / (2 * np.pi)  # of the original context
    ramp = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray((1 - ramp) * plain / factor + ramp * plain)
