"""How a fused projection's columns divide among its parts: q | k | v and gate | up, side by side.

    q has as many columns as o has rows; k and v share the rest. gate and up are halves.

Where the graph itself shows the seams (Slice, Split, GroupQueryAttention) they must agree.
Pure: reads a GraphView.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora_build.insert.naming import Parts
from remora_build.insert.view import GraphView, attribute
from remora_contract.errors import InvalidInput, Unsupported

_MOST_NUMBERS = 64


def part_sizes(parts: Parts, n: int, o_rows: int | None, where: str) -> tuple[int, ...]:
    """Columns of each part; `o_rows` is k of the layer's o projection. Raises Unsupported when they
    cannot be told."""
    if len(parts) == 1:
        return (n,)
    if parts == ("gate", "up") and n % 2 == 0:
        return (n // 2, n // 2)
    if parts == ("q", "k", "v") and o_rows is not None and 0 < o_rows < n and (n - o_rows) % 2 == 0:
        kv = (n - o_rows) // 2
        return (o_rows, kv, kv)
    raise Unsupported(
        f"{where}: the widths of {' | '.join(parts)} in its {n} columns cannot be told; "
        "give them with --attach"
    )


def check_seams(view: GraphView, y: str, sizes: Sequence[int], where: str) -> None:
    """Raises InvalidInput when the graph takes y apart elsewhere than between the parts."""
    seams = set(accumulate(sizes[:-1]))
    for found in _seams(view, y, sum(sizes)):
        if found and not seams <= found:
            raise InvalidInput(
                f"{where}: its parts would end at columns {sorted(seams)}, the graph cuts it at "
                f"{sorted(found)}: give the parts with --attach"
            )


def _seams(view: GraphView, y: str, n: int) -> list[set[int]]:
    """Cuts that readers of y [.., n] show: together those of all Slices; each Split's; each
    GroupQueryAttention's. Cuts that are computed at run time show nothing."""
    slices: set[int] = set()
    found: list[set[int]] = []
    for use in view.uses(y):
        node = view.nodes[use.node]
        if node.op_type == "Slice" and _last_axis(view, node, y):
            slices |= _slice_cuts(view, node, n)
        elif node.op_type == "Split" and attribute(node, "axis") in (-1, (view.rank(y) or 0) - 1):
            found.append(_split_cuts(view, node))
        elif node.op_type == "GroupQueryAttention":
            found.append(_attention_cuts(node, n))
    return [slices, *found]


def _last_axis(view: GraphView, node: Any, y: str) -> bool:
    axes = _numbers(view, node.input[3]) if len(node.input) > 3 else None
    return axes is not None and axes.size == 1 and axes[0] in (-1, (view.rank(y) or 0) - 1)


def _slice_cuts(view: GraphView, node: Any, n: int) -> set[int]:
    bounds = [_numbers(view, name) for name in node.input[1:3]]
    return {int(b[0]) for b in bounds if b is not None and b.size == 1 and 0 < b[0] < n}


def _split_cuts(view: GraphView, node: Any) -> set[int]:
    stored = _numbers(view, node.input[1]) if len(node.input) > 1 else None
    sizes = attribute(node, "split") if stored is None else [int(s) for s in stored]
    return set(accumulate(sizes[:-1])) if isinstance(sizes, list) else set()


def _attention_cuts(node: Any, n: int) -> set[int]:
    """Packed q | k | v of com.microsoft's GroupQueryAttention."""
    heads, kv_heads = attribute(node, "num_heads"), attribute(node, "kv_num_heads")
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or heads + 2 * kv_heads < 1:
        return set()
    head = n // (heads + 2 * kv_heads)
    return {heads * head, (heads + kv_heads) * head}


def _numbers(view: GraphView, value: str) -> NDArray[np.int64] | None:
    """A short stored int64 vector that lies in the model file itself."""
    node = view.producer(value)
    tensor = view.initializers.get(value)
    if tensor is None and node is not None and node.op_type == "Constant":
        tensor = attribute(node, "value")
    if tensor is None or tensor.data_location or tensor.data_type != 7:
        return None
    if len(tensor.raw_data) % 8 or len(tensor.raw_data) > 8 * _MOST_NUMBERS:
        return None
    if tensor.raw_data:
        return np.frombuffer(tensor.raw_data, "<i8")
    return np.array(list(tensor.int64_data)[:_MOST_NUMBERS], np.int64)
