"""The portable graph's attention masks, read before they are dropped for what
GroupQueryAttention implies: a causal mask, within a window where there is one.

    Where(kpos <= position [and kpos > position - window], 0, -inf)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from remora_agent.engine.ort.rewrite.edit import constant, input_of, producer, refuse
from remora_contract import targets

_SHAPE_ONLY = ("Slice", "Squeeze", "Unsqueeze", "Gather", "Reshape")


def window_of(mask: ir.Value, of: ir.Node) -> int | None:
    """How many positions a token sees, its own included; None: all before it. Raises EngineFault
    on any other mask."""
    where = producer(mask, "Where", of)
    allowed, forbidden = constant(where, 1), constant(where, 2)
    if np.any(allowed != 0) or not np.all(np.isneginf(forbidden)):
        refuse(where, "expected 0 where visible and -inf elsewhere")
    condition = input_of(where, 0).producer()
    if condition is None or condition.op_type != "And":
        _check_causal(producer(input_of(where, 0), "LessOrEqual", where))
        return None
    _check_causal(producer(input_of(condition, 0), "LessOrEqual", condition))
    return _window(producer(input_of(condition, 1), "Greater", condition))


def _check_causal(comparison: ir.Node) -> None:
    """kpos <= position"""
    _check_cache_positions(comparison)
    if not reaches(input_of(comparison, 1), targets.POSITION_IDS):
        refuse(comparison, f"expected a comparison with {targets.POSITION_IDS}")


def _window(comparison: ir.Node) -> int:
    """kpos > position - window"""
    _check_cache_positions(comparison)
    first = producer(input_of(comparison, 1), "Sub", comparison)
    window = constant(first, 1).reshape(-1)
    if len(window) != 1 or window[0] < 1 or not reaches(input_of(first, 0), targets.POSITION_IDS):
        refuse(first, f"expected {targets.POSITION_IDS} less a window")
    return int(window[0])


def _check_cache_positions(comparison: ir.Node) -> None:
    positions = constant(comparison, 0).reshape(-1)
    if not np.array_equal(positions, np.arange(len(positions))):
        refuse(comparison, "expected the positions of the cache on the left")


def reaches(value: ir.Value, graph_input: str) -> bool:
    """Does `value` come from the graph input through at most a few shape operators?"""
    for _ in range(6):
        node = value.producer()
        if node is None:
            return value.is_graph_input() and value.name == graph_input
        if node.op_type not in _SHAPE_ONLY:
            return False
        value = input_of(node, 0)
    return False
