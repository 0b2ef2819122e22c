"""Tables of the rotary embedding, rounded where transformers rounds them. Pure.

    plain f[i] = theta^(-2i / d)    cos[p, i] = a cos(p f[i])    sin likewise, a: attention factor

    linear    f / factor
    llama3    long waves f / factor, short ones f, a ramp between
    yarn      f / factor where few turns fit the original context, f where many do, a ramp between
    longrope  f / short[i]; in rows C to 2C of the table f / long[i], for positions p - C
              (two halves only where a sequence may outgrow the original context)

Powers, cosines and sines are taken in double and then rounded to float32, so that the tables do not
depend on which vector routines numpy picked for this processor; the product p * f is float32, as
in the models' own code.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from remora_contract.decoder import QueryScale, RopeSpec

Table = NDArray[np.float32]


def turning(rope: RopeSpec, head_dim: int) -> int:
    """Dimensions of a head that turn."""
    return head_dim if rope.dims is None else rope.dims


def rows(rope: RopeSpec, context: int) -> int:
    """Of the tables."""
    return context if rope.switches(context) is None else 2 * context


def tables(rope: RopeSpec, head_dim: int, context: int) -> tuple[Table, Table]:
    """cos and sin, both [rows, dims / 2]."""
    halves = [rope.short_factors, rope.long_factors] if rope.scaling == "longrope" else [()]
    if rope.switches(context) is None:
        halves = halves[:1]
    both = [_tables(rope, head_dim, context, factors) for factors in halves]
    return np.concatenate([cos for cos, _ in both]), np.concatenate([sin for _, sin in both])


def _tables(
    rope: RopeSpec, head_dim: int, context: int, factors: tuple[float, ...]
) -> tuple[Table, Table]:
    frequency = inverse_frequencies(rope, head_dim, factors).astype(np.float32)
    positions = np.arange(context, dtype=np.float32)
    angle = (positions[:, None] * frequency).astype(np.float64)
    both = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    factor = np.float32(rope.attention_factor)
    return both[0] * factor, both[1] * factor


def query_scales(scale: QueryScale, context: int) -> Table:
    """[context]: what queries at each position are multiplied by."""
    whole = np.floor(np.arange(context, dtype=np.float64) / scale.original_context)
    return np.asarray(1 + scale.beta * np.log(1 + whole), np.float32)


def inverse_frequencies(
    rope: RopeSpec, head_dim: int, factors: tuple[float, ...] = ()
) -> NDArray[np.float64]:
    """[dims / 2], radians a token; `factors` are one half of a longrope's."""
    dims = turning(rope, head_dim)
    exponent = np.arange(0, dims, 2, dtype=np.float64) / dims
    plain = (1.0 / rope.theta**exponent).astype(np.float32).astype(np.float64)
    if rope.scaling == "linear":
        return np.asarray(plain / _number(rope.factor))
    if rope.scaling == "llama3":
        return _llama3(rope, plain)
    if rope.scaling == "yarn":
        return _yarn(rope, plain, dims)
    if factors:
        stretched = np.array(factors, np.float32) * (rope.theta**exponent).astype(np.float32)
        return np.asarray(1.0 / stretched.astype(np.float64))
    return plain


def _llama3(rope: RopeSpec, plain: NDArray[np.float64]) -> NDArray[np.float64]:
    factor, original = _number(rope.factor), _number(rope.original_context)
    low, high = _number(rope.low_freq_factor), _number(rope.high_freq_factor)
    turns = original * plain / (2 * np.pi)  # of the original context
    ramp = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray((1 - ramp) * plain / factor + ramp * plain)


def _yarn(rope: RopeSpec, plain: NDArray[np.float64], dims: int) -> NDArray[np.float64]:
    """The ramp falls from 1 to 0 between the dimensions that turn `beta_fast` and `beta_slow` times
    in the original context."""
    original = _number(rope.original_context)

    def dimension(turns: float) -> float:
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(_number(rope.beta_fast)), dimension(_number(rope.beta_slow))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    width = high - low if high != low else 0.001
    kept = 1 - np.clip((np.arange(dims // 2) - low) / width, 0.0, 1.0)
    return np.asarray(plain / _number(rope.factor) * (1 - kept) + plain * kept)


def _number(value: float | None) -> float:
    """A field that the scaling needs. Raises ValueError when the document lacks it."""
    if value is None:
        raise ValueError("a rope lacks a number that its scaling needs")
    return float(value)
