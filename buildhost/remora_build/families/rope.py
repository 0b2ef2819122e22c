"""The rotary embedding a config.json asks for, in the words of transformers 4 (rope_theta and
rope_scaling) and 5 (rope_parameters). Pure.
"""

from __future__ import annotations

from typing import Any

from remora_build.families.fields import ConfigFields
from remora_contract.bundle import RopeSpec

DEFAULT_THETA = 10000.0
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_rope(fields: ConfigFields) -> RopeSpec:
    """Raises CheckpointInvalid, Unsupported (a rope type or option not carried, by its name)."""
    fields.only("partial_rotary_factor", 1, why="only full rotary embedding is carried")
    old, new = _table(fields, "rope_scaling"), _table(fields, "rope_parameters")
    if old and new and old != new:
        raise fields.unsupported("rope_scaling", old, f"rope_parameters say {new}")
    table = dict(new or old)
    theta = _theta(fields, table)
    kind = table.pop("rope_type", table.pop("type", "default"))
    table.pop("type", None)
    if table.pop("partial_rotary_factor", 1) != 1:
        raise fields.unsupported("partial_rotary_factor", "not 1", "only full rotary is carried")
    if kind == "default":
        _refuse_rest(fields, table, kind)
        return RopeSpec(theta=theta)
    if kind != "llama3":
        raise fields.unsupported("rope type", kind, "supported are 'default' and 'llama3'")
    numbers = {key: fields.check_positive(key, table.pop(key, None)) for key in _LLAMA3}
    _refuse_rest(fields, table, kind)
    return _llama3(fields, theta, numbers)


def _llama3(fields: ConfigFields, theta: float, numbers: dict[str, float]) -> RopeSpec:
    low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
    if low >= high:
        raise fields.invalid("low_freq_factor", f"below high_freq_factor ({high})", low)
    context = numbers["original_max_position_embeddings"]
    if context != int(context):
        raise fields.invalid("original_max_position_embeddings", "a whole number", context)
    return RopeSpec(
        theta=theta,
        scaling="llama3",
        factor=numbers["factor"],
        low_freq_factor=low,
        high_freq_factor=high,
        original_context=int(context),
    )


def _table(fields: ConfigFields, key: str) -> dict[str, Any]:
    value = fields.take(key, {})
    if not isinstance(value, dict):
        raise fields.invalid(key, "a table", value)
    return {k: v for k, v in value.items() if v is not None}


def _theta(fields: ConfigFields, table: dict[str, Any]) -> float:
    outer, inner = fields.take("rope_theta"), table.pop("rope_theta", None)
    if outer is not None and inner is not None and outer != inner:
        raise fields.unsupported("rope_theta", outer, f"rope_parameters say {inner}")
    chosen = inner if inner is not None else outer
    return fields.check_positive("rope_theta", DEFAULT_THETA if chosen is None else chosen)


def _refuse_rest(fields: ConfigFields, table: dict[str, Any], kind: str) -> None:
    for key, value in table.items():
        raise fields.unsupported(f"rope option {key}", value, f"not known for rope type {kind!r}")
