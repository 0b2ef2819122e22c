"""What a runtime says about itself. Frozen data, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class RuntimeState(Enum):
    SERVING = "serving"
    DRAINING = "draining"  # admits nothing, running requests end
    FAILED = "failed"  # the step thread died; restart the process
    CLOSED = "closed"


@dataclass(frozen=True)
class RuntimeStatus:
    state: RuntimeState
    backend: str
    bundle_digest: str
    engine_digest: str
    model_name: str
    context_tokens: int
    rows: int
    rows_busy: int
    queued: int
    requests_served: int  # finished, cancelled ones included
    requests_failed: int
    tokens_generated: int
    heartbeat_age_s: float  # since the step thread last moved; healthy well below 60
    warnings: tuple[str, ...] = ()  # settings of the bundle that are not honoured
