"""Which dialects of the portable graph a backend takes, by its version. Pure.

docs/dialects.md is written from these tables. A backend that is not here, or is older than its
first row, takes none: nobody has tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from remora_contract.bundle import GraphDialect
from remora_contract.errors import Refusal
from remora_contract.versions import version_numbers


@dataclass(frozen=True)
class Support:
    """Versions of a backend from `since` up to its next row."""

    backend: str
    since: tuple[int, int]
    dialects: tuple[GraphDialect, ...]  # the better one first
    why: str

    @property
    def version(self) -> str:
        return ".".join(map(str, self.since))


@dataclass(frozen=True)
class JetPack:
    version: str
    boards: str
    tensorrt: str
    cuda: str
    python: str


SUPPORT = (
    Support("tensorrt", (10, 3), ("legacy",), "lacks operators newer than opset 20"),
    Support("tensorrt", (10, 15), ("native", "legacy"), "has the operators of both"),
    Support("tensorrt_rtx", (1, 7), ("native", "legacy"), "both are built in the tests"),
    Support("edgellm", (0, 11), ("edgellm",), "runs engine folders of its own, no graph"),
    Support("onnxruntime", (1, 23), ("native", "legacy"), "one rewrite reads both"),
)
JETPACKS = (
    JetPack("6.2", "Orin", "10.3", "12.6", "3.10"),
    JetPack("7.0", "Thor", "10.13", "13.0", "3.12"),
    JetPack("7.1", "Thor", "10.13", "13.0", "3.12"),
    JetPack("7.2", "Orin, Thor", "10.16", "13.2", "3.12"),
)


def dialects_of(backend: str, version: str) -> tuple[GraphDialect, ...]:
    """What `backend` takes at `version`, the better one first."""
    numbers = version_numbers(version)
    rows = [s for s in SUPPORT if s.backend == backend and s.since <= numbers]
    return max(rows, key=lambda s: s.since).dialects if rows else ()


def dialects_of_jetpack(version: str) -> tuple[GraphDialect, ...]:
    """What the TensorRT of a JetPack takes; "6.2.1" is "6.2". Empty for one that is not listed."""
    numbers = version_numbers(version)[:2]
    found = [j for j in JETPACKS if version_numbers(j.version) == numbers]
    return dialects_of("tensorrt", found[0].tensorrt) if found else ()


def taken(dialects: Sequence[GraphDialect], backend: str, version: str) -> tuple[GraphDialect, ...]:
    """Which of a bundle's graphs the backend takes, the better one first."""
    return tuple(d for d in dialects_of(backend, version) if d in dialects)


def to_build(
    dialects: Sequence[GraphDialect], backend: str, version: str
) -> tuple[GraphDialect, ...]:
    """Which of a bundle's graphs the backend builds, a later one where it has no kernel for those
    before; ONNX Runtime has one for every operator, so it builds one."""
    found = taken(dialects, backend, version)
    return found[:1] if backend == "onnxruntime" else found


def dialects_in(facts: Mapping[str, Any]) -> tuple[GraphDialect, ...]:
    """Of a bundle's graphs, by its manifest's facts; empty for one that does not say. A dialect
    that nobody knows is left out: another version published it."""
    told = facts.get("dialects", [facts.get("dialect")])
    known: tuple[GraphDialect, ...] = get_args(GraphDialect)
    return tuple(d for d in known if d in told) if isinstance(told, list) else ()


def dialect_refusals(
    dialects: Sequence[GraphDialect], backends: Mapping[str, str]
) -> list[Refusal]:
    """Empty when one of `backends` (name -> version) takes one of a bundle's graphs, or none is
    known."""
    if not backends or any(taken(dialects, b, v) for b, v in backends.items()):
        return []
    have = ", ".join(f"{backend} {version}" for backend, version in sorted(backends.items()))
    need = f"{_takers(dialects)} for the {' or '.join(dialects)} graph"
    return [Refusal("dialect", need, have)]


def _takers(dialects: Sequence[GraphDialect]) -> str:
    """`tensorrt >= 10.15 or onnxruntime >= 1.23`"""
    oldest: dict[str, str] = {}
    for row in SUPPORT:
        if set(dialects) & set(row.dialects):
            oldest.setdefault(row.backend, row.version)
    return " or ".join(f"{backend} >= {version}" for backend, version in oldest.items())
