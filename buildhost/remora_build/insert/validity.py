"""onnx.checker's word on what was written. A model that did not pass before is told from one that we
broke.

ONNX Runtime's own exporters put SimplifiedLayerNormalization, an operator that ONNX does not define,
into the default domain; for the check alone it is put where it belongs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from remora_build.insert.patterns import MICROSOFT
from remora_build.insert.source import SourceModel
from remora_contract.errors import InternalFault, InvalidInput

_RUNTIME_OPS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")


def check_valid(source: SourceModel, written: Path) -> None:
    """Raises InvalidInput when the given model is at fault, InternalFault when the insertion is."""
    complaint = _complaint(written, written)
    if complaint is None:
        return
    beside = written.with_name(".source.onnx")
    before = _complaint(source.path, beside)
    if before is not None:
        raise InvalidInput(f"{source.path} does not pass onnx.checker: {before}")
    raise InternalFault(f"the graph with its adapter inputs does not pass onnx.checker: {complaint}")


def _complaint(path: Path, check_at: Path) -> str | None:
    """What onnx.checker says of the model at `path`, looked at as `check_at` when it has to be
    changed for the check or lies elsewhere; None: it passes."""
    import onnx

    proto = onnx.load(path, load_external_data=False)
    moved = _move_runtime_ops(proto)
    at = check_at
    if moved or check_at != path:
        at = check_at.with_name(".check.onnx")
        at.write_bytes(proto.SerializeToString())
    del proto
    try:
        onnx.checker.check_model(str(at))
    except (onnx.checker.ValidationError, RuntimeError, ValueError) as e:
        return str(e).strip().splitlines()[0][:300]
    finally:
        if at != path:
            at.unlink(missing_ok=True)
    return None


def _move_runtime_ops(proto: Any) -> bool:
    moved = False
    for node in proto.graph.node:
        if not node.domain and node.op_type in _RUNTIME_OPS:
            node.domain, moved = MICROSOFT, True
    if moved and all(o.domain != MICROSOFT for o in proto.opset_import):
        proto.opset_import.add(domain=MICROSOFT, version=1)
    return moved
