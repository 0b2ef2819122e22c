"""onnx.checker's word on what was written. A model that did not pass before is told from one that
we broke.

ONNX Runtime's own exporters put SimplifiedLayerNormalization, an operator that ONNX does not
define, into the default domain; for the check alone it is put where it belongs.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from remora_build.insert.patterns import MICROSOFT
from remora_build.insert.source import SourceModel
from remora_contract.errors import InternalFault, InvalidInput

_RUNTIME_OPS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")
_MOST_TEXT = 300


def check_valid(source: SourceModel, written: Path) -> None:
    """Raises InvalidInput when the given model is at fault, InternalFault when the insertion is.
    `written` lies beside its external data; a file may come and go there."""
    misplaced = bool(_misplaced(source.proto.graph.node))
    complaint = _complaint(written, written.parent if misplaced else None)
    if complaint is None:
        return
    before = _complaint(source.path, written.parent if misplaced else None)
    if before is not None:
        raise InvalidInput(f"{source.path} does not pass onnx.checker: {before}")
    raise InternalFault(
        f"the graph with its adapter inputs does not pass onnx.checker: {complaint}"
    )


def _complaint(path: Path, moved_to: Path | None) -> str | None:
    """What onnx.checker says of a model; None: it passes. With `moved_to`, a directory that has its
    external data, a copy with the runtime's operators in their place is checked."""
    import onnx

    at = path if moved_to is None else _corrected(path, moved_to / ".check.onnx")
    try:
        onnx.checker.check_model(str(at))
    except (onnx.checker.ValidationError, RuntimeError, ValueError) as e:
        return " ".join(str(e).split())[:_MOST_TEXT]
    finally:
        if at != path:
            at.unlink()
    return None


def _corrected(path: Path, to: Path) -> Path:
    import onnx

    proto = onnx.load(path, load_external_data=False)
    for node in _misplaced(proto.graph.node):
        node.domain = MICROSOFT
    if all(o.domain != MICROSOFT for o in proto.opset_import):
        proto.opset_import.add(domain=MICROSOFT, version=1)
    to.write_bytes(proto.SerializeToString())
    return to


def _misplaced(nodes: Iterable[Any]) -> list[Any]:
    return [n for n in nodes if not n.domain and n.op_type in _RUNTIME_OPS]
