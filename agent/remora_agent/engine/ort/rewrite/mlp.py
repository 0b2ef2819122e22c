"""gate * Sigmoid(gate) -> QuickGelu(alpha = 1): one kernel instead of two."""

from __future__ import annotations

import re

from remora_agent.engine.ort.rewrite.edit import MICROSOFT, Editor, input_of, refuse

_SHARE = re.compile(r"layers\.\d+\.share\.sigmoid")  # weighs the shared expert


def fuse_silu(editor: Editor) -> None:
    """Rewrites every Sigmoid. Raises EngineFault when its input is not its factor."""
    for sigmoid in editor.nodes("Sigmoid"):
        gate = input_of(sigmoid, 0)
        users = [use.node for use in sigmoid.outputs[0].uses()]
        if _SHARE.fullmatch(sigmoid.name or ""):
            continue
        if len(users) != 1 or users[0].op_type != "Mul" or gate not in users[0].inputs:
            refuse(sigmoid, "expected gate * Sigmoid(gate)")
        (silu,) = editor.emit(
            "QuickGelu",
            [gate],
            f"{sigmoid.name}.silu",
            domain=MICROSOFT,
            attributes={"alpha": 1.0},
        )
        editor.replace(users[0].outputs[0], silu)
