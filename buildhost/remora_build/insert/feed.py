"""Arrays for the inputs that `remora-build insert-lora` adds, for a session of your own.

    bank = load_bank(Path("OUT"))
    adapters = [read_sidecar(Path("pirate")), read_sidecar(Path("formal"))]
    feed = bank_inputs(bank, adapters, weights=[[1, 0], [0, 0.5]])      # row 0 pirate, row 1 formal
    session.run(None, {"input_ids": ids, ..., **feed})

Needs numpy and safetensors (ml_dtypes for a bfloat16 graph). Every tensor of an adapter is bound or
an error names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from remora_build.insert.description import BranchInputs, GateInput, InsertedBank
from remora_contract.adapter import WEIGHTS_FILE, Adapter, load_adapter
from remora_contract.bundle import verify_files
from remora_contract.errors import AdapterInvalid, RequestInvalid, Unsupported
from remora_contract.targets import AdapterTarget, Projection

Array = NDArray[Any]
# target -> (a [k, r], b [r, n]), the scale folded into b.
AdapterTensors = Mapping[AdapterTarget, tuple[Array, Array]]


def read_sidecar(directory: Path) -> dict[AdapterTarget, tuple[Array, Array]]:
    """A converted adapter's tensors, its digests verified. Raises ArtifactInvalid, DocumentInvalid,
    AdapterInvalid for a damaged one and Unsupported for one that is more than A and B."""
    from safetensors.numpy import load_file

    adapter = load_adapter(directory)
    _check_plain(directory, adapter)
    verify_files(directory, adapter.files)
    stored = load_file(directory / WEIGHTS_FILE)
    try:
        tensors = {
            t.target: (stored.pop(t.target.tensor_a()), stored.pop(t.target.tensor_b()))
            for t in adapter.targets
        }
    except KeyError as e:
        raise AdapterInvalid(f"{directory / WEIGHTS_FILE} lacks {e}: convert it again") from e
    if stored:
        raise AdapterInvalid(
            f"{directory} holds {min(stored)}, which is no factor of a projection: an inserted "
            "bank takes plain LoRA only"
        )
    return tensors


def _check_plain(directory: Path, adapter: Adapter) -> None:
    """An inserted bank has A, B and a gate of rows; whatever else an adapter does is not there."""
    reason = None
    if adapter.invocation_tokens:
        reason = "is active from its invocation tokens on (aLoRA), not for whole rows"
    elif adapter.dora:
        reason = "rescales outputs (DoRA)"
    elif any(t.bias for t in adapter.targets):
        reason = "has biases"
    if reason is not None:
        raise Unsupported(f"{directory} {reason}: an inserted bank takes plain LoRA only")


def bank_inputs(
    bank: InsertedBank, adapters: Sequence[AdapterTensors], weights: ArrayLike
) -> dict[str, Array]:
    """Every input of the bank by name.

    weights  [rows, adapters]: how much of each adapter a row takes. Rows are those of the
             activations (see `rows` of the gates), or one row for all of them.

    Raises AdapterInvalid for a target that the graph does not have or that has another shape there,
    RequestInvalid for weights of another shape.
    """
    gate_rows = np.asarray(weights, np.float32)
    if gate_rows.size == 0 and not adapters:
        gate_rows = np.zeros((max(len(gate_rows), 1), 0), np.float32)
    if gate_rows.ndim != 2 or gate_rows.shape[1] != len(adapters):
        raise RequestInvalid(
            f"weights are {list(gate_rows.shape)}; they must be [rows, {len(adapters)}]"
        )
    if not np.isfinite(gate_rows).all():
        raise RequestInvalid("a weight is NaN or infinite; it would spoil every row")
    for adapter in adapters:
        _check_bound(bank, adapter)
    feed: dict[str, Array] = {}
    for gate in bank.gates:
        branches = [b for b in bank.branches if b.slot == gate.slot]
        widths = [_widths(branches, adapter) for adapter in adapters]
        columns = [sum(w.values()) for w in widths]
        kind = _dtype(gate)
        feed[gate.name] = np.repeat(gate_rows, columns, axis=1)[:, None, :].astype(kind)
        for branch in branches:
            feed[branch.a], feed[branch.b] = _factors(branch, adapters, widths, kind)
    return feed


def _dtype(gate: GateInput) -> np.dtype[Any]:
    if gate.dtype == "bfloat16":
        import ml_dtypes

        kind: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return kind
    return np.dtype(gate.dtype)


def _check_bound(bank: InsertedBank, adapter: AdapterTensors) -> None:
    shapes = {
        AdapterTarget(b.layer, p.projection): (b.k, p.n) for b in bank.branches for p in b.parts
    }
    for target, (a, b) in adapter.items():
        if target not in shapes:
            raise AdapterInvalid(
                f"the adapter changes {target.name()}, which the graph has no inputs for: insert "
                "the bank again without --targets, or convert an adapter that leaves it alone"
            )
        k, n = shapes[target]
        if a.ndim != 2 or b.ndim != 2 or (a.shape[0], b.shape[1]) != (k, n):
            raise AdapterInvalid(
                f"{target.name()} is {list(a.shape)} x {list(b.shape)} in the adapter, "
                f"{k} x {n} in the graph: it was trained on another base"
            )
        if a.shape[1] != b.shape[0]:
            raise AdapterInvalid(f"{target.name()}: A and B have different ranks")
        if not _finite(a) or not _finite(b):
            raise AdapterInvalid(f"{target.name()} holds NaN or infinity; it would spoil every row")


def _finite(array: Array) -> bool:
    return bool(np.isfinite(array.astype(np.float32)).all())


def _widths(branches: Sequence[BranchInputs], adapter: AdapterTensors) -> dict[Projection, int]:
    """Columns of T that the adapter takes for each part of a slot: its largest rank in a layer."""
    widths: dict[Projection, int] = {}
    for branch in branches:
        for part in branch.parts:
            pair = adapter.get(AdapterTarget(branch.layer, part.projection))
            rank = 0 if pair is None else pair[0].shape[1]
            widths[part.projection] = max(widths.get(part.projection, 0), rank)
    return widths


def _factors(
    branch: BranchInputs,
    adapters: Sequence[AdapterTensors],
    widths: Sequence[Mapping[Projection, int]],
    kind: np.dtype[Any],
) -> tuple[Array, Array]:
    """A [k, T] and B [T, n] of one layer: adapters side by side, each its parts side by side."""
    t = sum(sum(w.values()) for w in widths)
    a, b = np.zeros((branch.k, t), kind), np.zeros((t, branch.n), kind)
    column = 0
    for adapter, width in zip(adapters, widths, strict=True):
        first = 0
        for part in branch.parts:
            target = AdapterTarget(branch.layer, part.projection)
            if (pair := adapter.get(target)) is not None:
                rank = pair[0].shape[1]
                with np.errstate(over="ignore"):
                    a[:, column : column + rank] = pair[0]
                    b[column : column + rank, first : first + part.n] = pair[1]
                _check_held(target, a[:, column:], b[column:], kind)
            column += width[part.projection]
            first += part.n
    return a, b


def _check_held(target: AdapterTarget, a: Array, b: Array, kind: np.dtype[Any]) -> None:
    if not _finite(a) or not _finite(b):
        raise AdapterInvalid(f"{target.name()} has values that {kind} cannot hold")
