"""lora.json: which inputs an inserted bank takes, and what the directory holds.

    OUT/
      lora.json      this document
      model.onnx     the graph with its bank; external data beside it, under the names it had
      attach.json    the attach points, every value written out (`attach`)

For a slot with input x [rows, s, k] and output y [rows, s, n], in every layer that has it:
    y + ((x A) * gate) B        A [k, T]   B [T, n]   gate [rows or 1, 1, T]
T is the slot's own, the same in every layer, from 0 on. B is zero outside a column's part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from remora_build.insert.attach import Part, slot_name
from remora_build.insert.branches import Branch, Dtype, Gate, Rows
from remora_contract.bundle import BundleFile, check_listed, read_document
from remora_contract.decoder import MAX_LAYERS
from remora_contract.errors import ArtifactInvalid
from remora_contract.strict import loads

LORA_JSON = "lora.json"
MODEL_FILE = "model.onnx"
ATTACH_FILE = "attach.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class GateInput:
    """`rows`: what the activations' first axis counts. `dtype` is that of A and B too."""

    name: str
    slot: str
    dtype: Dtype
    rows: Rows


@dataclass(frozen=True)
class BranchInputs:
    """One linear layer's A [k, T] and B [T, n]; `parts` lie side by side in n."""

    layer: int
    slot: str
    a: str
    b: str
    k: int
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.layer < MAX_LAYERS or not 1 <= self.k <= 1 << 24:
            raise ValueError(f"layer {self.layer} with k {self.k} is out of range")
        if slot_name(tuple(p.projection for p in self.parts)) != self.slot:
            raise ValueError(f"slot {self.slot!r} is not named after its parts")

    @property
    def n(self) -> int:
        return sum(p.n for p in self.parts)


@dataclass(frozen=True)
class InsertedBank:
    format_version: int
    source_digest: str  # of the ONNX file that was given, without its external data
    gates: tuple[GateInput, ...]
    branches: tuple[BranchInputs, ...]
    files: tuple[BundleFile, ...]
    exporter: str

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(f"format version {self.format_version} is not {FORMAT_VERSION}")
        check_listed(self.files, MODEL_FILE)
        slots = [g.slot for g in self.gates]
        if len(set(slots)) != len(slots) or {b.slot for b in self.branches} != set(slots):
            raise ValueError("gates and branches do not name the same slots")

    @property
    def bytes(self) -> int:
        return sum(f.size for f in self.files)


def describe(
    gates: Sequence[Gate],
    branches: Sequence[Branch],
    files: Sequence[BundleFile],
    *,
    source_digest: str,
    exporter: str,
) -> InsertedBank:
    return InsertedBank(
        FORMAT_VERSION,
        source_digest,
        tuple(GateInput(g.name, g.slot, g.dtype, g.rows) for g in gates),
        tuple(BranchInputs(b.layer, b.slot, b.a, b.b, b.k, b.parts) for b in branches),
        tuple(files),
        exporter,
    )


def load_bank(directory: Path) -> InsertedBank:
    """Parses DIRECTORY/lora.json. Raises ArtifactInvalid, DocumentInvalid."""
    path = directory / LORA_JSON
    if not path.exists():
        raise ArtifactInvalid(
            f"{directory} has no {LORA_JSON}; run remora-build insert-lora MODEL.onnx OUT"
        )
    return loads(InsertedBank, read_document(path), str(path))
