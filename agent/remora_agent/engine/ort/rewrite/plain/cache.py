"""ScatterElements into the cache along its positions -> TensorScatter.

cache[b, h, position[b, s], d] = new[b, h, s, d]        positions of a call are consecutive
"""

from __future__ import annotations

import onnx_ir as ir

from remora_agent.engine.ort.rewrite.edit import Editor, input_of, integer, producer, refuse
from remora_agent.engine.ort.rewrite.masks import reaches
from remora_contract import targets


def join_cache(editor: Editor) -> None:
    """Rewrites every ScatterElements into a graph input. Raises EngineFault on one that is no write
    of new keys or values."""
    for scatter in editor.nodes("ScatterElements"):
        if input_of(scatter, 0).is_graph_input():
            _join(editor, scatter)


def _join(editor: Editor, scatter: ir.Node) -> None:
    past, index, new = (input_of(scatter, i) for i in range(3))
    expand = producer(index, "Expand", scatter)
    positions = input_of(expand, 0)
    if integer(scatter, "axis", 0) not in (2, -2):
        refuse(scatter, "expected a write into the cache along its positions")
    if not reaches(positions, targets.POSITION_IDS) or "reduction" in scatter.attributes:
        refuse(scatter, f"expected a plain write at {targets.POSITION_IDS}")
    name = f"{scatter.name}.joined"
    attributes = {"axis": -2, "mode": "linear"}
    (written,) = editor.emit("TensorScatter", [past, new, positions], name, attributes=attributes)
    editor.replace(scatter.outputs[0], written)
