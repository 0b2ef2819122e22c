"""The attach points: which node of the graph is which projection. A document, derived or given.

    {"format_version": 1,
     "points": [{"layer": 0, "node": "/model/layers.0/attn/qkv_proj/MatMul",
                 "parts": [{"projection": "q", "n": 64}, {"projection": "k", "n": 32}, ...]}],
     "not_adapted": ["/lm_head/MatMul"], "undecided": []}

`node` is a node's name or, where that is missing or not unique, the value it makes. `input` and
`output` are the values a branch reads and is added to; without them they are found (`taps`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from remora_build.insert.shown import listed, shown
from remora_contract.bundle import read_document
from remora_contract.decoder import MAX_LAYERS
from remora_contract.errors import DocumentInvalid, InvalidInput
from remora_contract.strict import loads, plain
from remora_contract.targets import GROUPS, PARTS, AdapterTarget, Projection

FORMAT_VERSION = 1
_MAX_WIDTH = 1 << 24


@dataclass(frozen=True)
class Part:
    """One projection's columns of a point's output."""

    projection: Projection
    n: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= _MAX_WIDTH:
            raise ValueError(f"n is {self.n}, outside 1 to {_MAX_WIDTH}")


@dataclass(frozen=True)
class AttachPoint:
    """One linear layer of the graph: a projection, or several fused side by side."""

    layer: int
    node: str
    parts: tuple[Part, ...]
    input: str | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.layer < MAX_LAYERS:
            raise ValueError(f"layer is {self.layer}, outside 0 to {MAX_LAYERS - 1}")
        slot_name(tuple(p.projection for p in self.parts))

    @property
    def projections(self) -> tuple[Projection, ...]:
        return tuple(p.projection for p in self.parts)

    @property
    def slot(self) -> str:
        return slot_name(self.projections)

    @property
    def n(self) -> int:
        return sum(p.n for p in self.parts)

    def targets(self) -> tuple[AdapterTarget, ...]:
        return tuple(AdapterTarget(self.layer, p) for p in self.projections)


def slot_name(parts: tuple[Projection, ...]) -> str:
    """What a point's inputs are called after: its projection, or the group it is whole of. Raises
    ValueError for parts that no name is defined for."""
    if len(parts) == 1 and any(parts[0] in PARTS[g] for g in GROUPS):
        return parts[0]
    for group in GROUPS:
        if PARTS[group] == parts:
            return group
    known = ", ".join(" | ".join(PARTS[g]) for g in GROUPS)
    raise ValueError(f"parts are {' | '.join(parts)}; known are one projection, {known}")


@dataclass(frozen=True)
class AttachPlan:
    points: tuple[AttachPoint, ...]
    not_adapted: tuple[str, ...] = ()  # linear layers that stay as they are
    undecided: tuple[str, ...] = ()  # linear layers that nothing tells what they are
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(f"format version {self.format_version} is not {FORMAT_VERSION}")

    def document(self) -> bytes:
        """For people to read and correct: equal plans give equal bytes."""
        return (json.dumps(plain(self), indent=2, ensure_ascii=False) + "\n").encode()

    def narrowed(self, wanted: Sequence[Projection]) -> AttachPlan:
        """Without the points that have no wanted part; they stay as they are."""
        kept = tuple(p for p in self.points if set(p.projections) & set(wanted))
        left = tuple(p.node for p in self.points if p not in kept)
        return replace(self, points=kept, not_adapted=(*self.not_adapted, *left))

    def by_target(self) -> Mapping[AdapterTarget, AttachPoint]:
        """Raises InvalidInput when two points are one module."""
        found: dict[AdapterTarget, AttachPoint] = {}
        for point in self.points:
            for target in point.targets():
                if target in found:
                    raise InvalidInput(
                        f"{target.name()} is two nodes, {shown(found[target].node)} and "
                        f"{shown(point.node)}: give the attach points with --attach"
                    )
                found[target] = point
        return found


def load_plan(path: Path) -> AttachPlan:
    """Raises ArtifactInvalid when it cannot be read, DocumentInvalid for what it says."""
    plan = loads(AttachPlan, read_document(path), str(path))
    if plan.undecided:
        raise DocumentInvalid(
            f"{path}: undecided still lists {listed(plan.undecided)}: move each to points or to "
            "not_adapted"
        )
    return plan
