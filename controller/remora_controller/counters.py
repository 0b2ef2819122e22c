"""What this process counted since it began, and a snapshot for Prometheus. Knows no exporter."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Counters:
    """Written by the event loop only; an int is read whole by any thread."""

    syncs: int = 0
    fetched_bytes: int = 0
    joins: int = 0
    watchers: int = 0
    devices_by_status: dict[str, int] = field(default_factory=dict)
    rollouts_by_state: dict[str, int] = field(default_factory=dict)
    late_by_state: dict[str, int] = field(default_factory=dict)
