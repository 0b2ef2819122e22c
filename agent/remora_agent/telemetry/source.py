"""What one source of measurements is, and how a measurement is named.

Names are part of the product: they appear in `remora top`, on /metrics and in docs/telemetry.md.
A name ending in `_total` only grows while the process lives; everything else is a level.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Reading:
    """`label` tells several of one kind apart: a sensor, a power rail. Units are in the name."""

    name: str
    value: float
    label: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"metric name {self.name!r}: lower case, digits and _ only")

    @property
    def wire_name(self) -> str:
        """`name` or `name.label`, as the controller stores it."""
        return f"{self.name}.{self.label}" if self.label else self.name

    @property
    def is_counter(self) -> bool:
        return self.name.endswith("_total")


class Source(Protocol):
    @property
    def name(self) -> str: ...

    def read(self) -> Iterator[Reading]:
        """Everything it knows now. Raises Unavailable when it went away."""
        ...

    def close(self) -> None: ...
