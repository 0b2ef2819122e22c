"""Is serving well while a new release soaks? Pure comparison of counters at the switch and now.

Counters carry the names of `telemetry.serving`; one that is missing counts as zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from remora_agent.control.activation import MAX_ABNORMAL_EXITS
from remora_agent.host import ServingState
from remora_agent.telemetry.serving import ENGINE_FAULTS, REQUESTS, REQUESTS_FAILED


@dataclass(frozen=True)
class SoakLimits:
    failed_fraction: float = 0.2
    # Fewer failures than this are an accident, not a rate.
    min_failures: int = 3


DEFAULT_LIMITS = SoakLimits()


def unhealthy_reason(
    release_id: str | None,
    serving: ServingState | None,
    healthy: bool,
    baseline: Mapping[str, float],
    now: Mapping[str, float],
    limits: SoakLimits = DEFAULT_LIMITS,
) -> str | None:
    """Why the release must go, or None."""
    if serving is None:
        return "nothing serves any more"
    if serving.release_id != release_id:
        return f"{serving.release_id} serves instead"
    if not healthy:
        return "the engine's step thread died or stands still"
    faults = _grown(ENGINE_FAULTS, baseline, now)
    if faults >= MAX_ABNORMAL_EXITS:
        return f"the engine failed {faults:.0f} times"
    requests, failed = (_grown(n, baseline, now) for n in (REQUESTS, REQUESTS_FAILED))
    if failed >= limits.min_failures and failed > limits.failed_fraction * requests:
        return f"{failed:.0f} of {requests:.0f} requests failed"
    return None


def _grown(name: str, baseline: Mapping[str, float], now: Mapping[str, float]) -> float:
    return now.get(name, 0.0) - baseline.get(name, 0.0)
