"""Slices that cut one value into all its parts -> one Split."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx_ir as ir

from remora_agent.engine.ort.rewrite.edit import Editor, input_of, refuse
from remora_agent.engine.ort.rewrite.operands import slice_bounds


def merge_slices(editor: Editor) -> None:
    """Rewrites every group of slices that is still read. Raises EngineFault on a partial cut."""
    groups: dict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in editor.nodes("Slice"):
        source = input_of(node, 0)
        if node.outputs[0].uses() and not source.is_graph_input():
            groups[source].append(node)
    for source, cuts in groups.items():
        _merge(editor, source, cuts)


def _merge(editor: Editor, source: ir.Value, cuts: list[ir.Node]) -> None:
    bounds = [slice_bounds(cut) for cut in cuts]
    order = sorted(range(len(cuts)), key=lambda i: bounds[i])
    at = 0
    for i in order:
        begin, end = bounds[i]
        if begin != at or end <= begin:
            refuse(cuts[i], f"expected the next part to begin at column {at}")
        at = end
    sizes = [bounds[i][1] - bounds[i][0] for i in order]
    table = editor.initializer(np.array(sizes, np.int64), f"split.{'.'.join(map(str, sizes))}")
    outputs = editor.emit(
        "Split",
        [source, table],
        f"{source.name}.split",
        outputs=[f"{cuts[i].outputs[0].name}.part" for i in order],
        attributes={"axis": -1},
    )
    for i, value in zip(order, outputs, strict=True):
        editor.replace(cuts[i].outputs[0], value)
