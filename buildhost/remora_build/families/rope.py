"""The rotary embedding a config.json asks for, in the words of transformers 4 (rope_theta and
rope_scaling) and 5 (rope_parameters). Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from remora_build.families.fields import ConfigFields
from remora_contract.decoder import MAX_POSITION, RopeSpec

_ORIGINAL = "original_max_position_embeddings"
# Beyond these a table's angles leave float32; no model is near.
_FACTORS = (1e-6, 1e6)
_MOST_THETA = 1e15
_SU = ("su", "longrope")  # the first Phi-3 checkpoints call it so


@dataclass(frozen=True)
class RopeDefaults:
    """What a family's rope is where the config says nothing."""

    theta: float = 10000.0
    partial: float | None = None  # of the head's dimensions turn; None: all, whatever it says
    interleaved: bool = False  # never a config's word: it is the family's
    original: int | None = None  # context before scaling, where the config says it outside


def read_rope(
    fields: ConfigFields, head_dim: int, max_position: int, defaults: RopeDefaults
) -> RopeSpec:
    """Takes rope_theta, rope_scaling, rope_parameters and partial_rotary_factor.

    Raises CheckpointInvalid, Unsupported (a rope type or option not carried, by its name).
    """
    old, new = fields.nested("rope_scaling"), fields.nested("rope_parameters")
    if old.left() and new.left() and old.left() != new.left():
        raise fields.unsupported("rope_scaling", old.left(), f"rope_parameters say {new.left()}")
    table = new if new.left() else old
    for key in ("rope_theta", "partial_rotary_factor"):
        _move(fields, table, key)
    return read_table(table, head_dim, max_position, defaults)


def read_table(
    table: ConfigFields, head_dim: int, max_position: int, defaults: RopeDefaults
) -> RopeSpec:
    """One table of rope parameters, the whole of it."""
    inner, outer = table.take("rope_type"), table.take("type")
    kind = str(inner or outer or "default")
    kind = "longrope" if kind in _SU else kind
    if kind not in _SCALINGS:
        raise table.unsupported("rope type", kind, _REFUSED.get(kind, _CARRIED))
    theta = table.within("rope_theta", 1.0, _MOST_THETA, defaults.theta)
    dims = _dims(table, head_dim, defaults.partial)
    scaled = _SCALINGS[kind](table, _Plain(theta, dims, max_position, defaults.original))
    rope = RopeSpec(
        theta=theta,
        dims=None if dims == head_dim else dims,
        interleaved=defaults.interleaved,
        **scaled,
    )
    for key, value in table.left().items():
        raise table.unsupported(f"rope option {key}", value, f"not known for rope type {kind!r}")
    return rope


def _move(fields: ConfigFields, table: ConfigFields, key: str) -> None:
    """A number that may stand beside the table goes into it."""
    outer, inner = fields.take(key), table.left().get(key)
    if outer is not None and inner is not None and outer != inner:
        raise fields.unsupported(key, outer, f"the table of rope parameters says {inner}")
    if outer is not None:
        table.default(key, outer)


def _dims(table: ConfigFields, head_dim: int, default: float | None) -> int:
    if default is None:
        table.only("partial_rotary_factor", 1, why="this family turns whole heads")
        return head_dim
    partial = table.positive("partial_rotary_factor", default)
    dims = int(head_dim * min(partial, 2.0))
    if dims % 2 or not 2 <= dims <= head_dim:
        need = f"a part of the head's {head_dim} dimensions, an even number of them"
        raise table.invalid("partial_rotary_factor", need, partial)
    return dims


@dataclass(frozen=True)
class _Plain:
    """The rope before scaling."""

    theta: float
    dims: int
    max_position: int
    outer_original: int | None

    def original(self, table: ConfigFields) -> int:
        """Takes the context before scaling."""
        outer, inner = self.outer_original, table.take(_ORIGINAL)
        if outer is not None and inner is not None and outer != inner:
            raise table.unsupported(_ORIGINAL, inner, f"beside the table it is {outer}")
        value = next(v for v in (outer, inner, self.max_position) if v is not None)
        whole = int(value) if isinstance(value, float) and value.is_integer() else value
        return table.check_whole(_ORIGINAL, whole, MAX_POSITION)


_Scaled = dict[str, Any]  # fields of RopeSpec


def _plain(table: ConfigFields, plain: _Plain) -> _Scaled:
    return {}


def _linear(table: ConfigFields, plain: _Plain) -> _Scaled:
    return {"scaling": "linear", "factor": table.within("factor", *_FACTORS)}


def _llama3(table: ConfigFields, plain: _Plain) -> _Scaled:
    factor = table.within("factor", *_FACTORS)
    low, high = table.positive("low_freq_factor"), table.positive("high_freq_factor")
    if low >= high:
        raise table.invalid("low_freq_factor", f"below high_freq_factor ({high})", low)
    return {
        "scaling": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_context": plain.original(table),
    }


def _yarn(table: ConfigFields, plain: _Plain) -> _Scaled:
    if plain.theta <= 1:
        raise table.invalid("rope_theta", "above 1 for yarn", plain.theta)
    original = plain.original(table)
    factor = table.within("factor", *_FACTORS, plain.max_position / original)
    inferred = _yarn_attention(table, factor)
    table.default("truncate", True)  # where it is absent; null counts as false
    return {
        "scaling": "yarn",
        "factor": factor,
        "original_context": original,
        "beta_fast": table.within("beta_fast", *_FACTORS, 32.0),
        "beta_slow": table.within("beta_slow", *_FACTORS, 1.0),
        "truncate": table.flag("truncate"),
        "attention_factor": table.within("attention_factor", *_FACTORS, inferred),
    }


def _yarn_attention(table: ConfigFields, factor: float) -> float:
    """0 means the same as nothing to `mscale` and `mscale_all_dim`, which count in pairs only."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    given = [(key, table.take(key)) for key in ("mscale", "mscale_all_dim")]
    above, below = [table.check_positive(key, v) if v else 0.0 for key, v in given]
    return scale(above) / scale(below) if above and below else scale(1.0)


def _longrope(table: ConfigFields, plain: _Plain) -> _Scaled:
    original = plain.original(table)
    if original < 2:
        raise table.invalid(_ORIGINAL, "at least 2 for longrope", original)
    factor = table.within("factor", *_FACTORS, plain.max_position / original)
    inferred = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "scaling": "longrope",
        "original_context": original,
        "attention_factor": table.within("attention_factor", *_FACTORS, inferred),
        "short_factors": _factors(table, "short_factor", plain.dims // 2),
        "long_factors": _factors(table, "long_factor", plain.dims // 2),
    }


def _factors(table: ConfigFields, key: str, count: int) -> tuple[float, ...]:
    values = table.take(key)
    if not isinstance(values, list) or len(values) != count:
        raise table.invalid(key, f"a list of {count} numbers", values)
    factors = tuple(table.check_positive(key, value) for value in values)
    if not all(_FACTORS[0] <= factor <= _FACTORS[1] for factor in factors):
        raise table.invalid(key, "factors from {:g} to {:g}".format(*_FACTORS), values)
    return factors


_SCALINGS: dict[str, Callable[[ConfigFields, _Plain], _Scaled]] = {
    "default": _plain,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
_CARRIED = f"carried are {', '.join(_SCALINGS)}"
_REFUSED = {
    "dynamic": "its frequencies follow the length a sequence has reached, so the keys in the cache "
    f"would have to be computed again; {_CARRIED}"
}
