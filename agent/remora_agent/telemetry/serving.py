"""The serving host's metrics under the names that telemetry, soak checks and docs use. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from remora_agent.telemetry.source import Reading
from remora_contract.experiments import (
    ARM_COUNTS,
    ARM_PREFIX,
    SHADOW_COUNTS,
    SHADOW_PREFIX,
    TOTAL,
)

REQUESTS = "requests_total"
REQUESTS_FAILED = "requests_failed_total"
TOKENS = "completion_tokens_total"
ENGINE_FAULTS = "engine_faults_total"
# What the runtime counts, under the name it has there -> the name it has everywhere else.
COUNTERS = {
    "requests": REQUESTS,
    "failures": REQUESTS_FAILED,
    "tokens": TOKENS,
    "drafted_tokens": "drafted_tokens_total",
    "accepted_tokens": "accepted_tokens_total",
    "engine_faults": ENGINE_FAULTS,
    "adapter_hits": "adapter_hits_total",
    "adapter_loads": "adapter_loads_total",
    "adapter_load_s": "adapter_load_seconds_total",
    "adapter_reads": "adapter_reads_total",
    "adapter_read_s": "adapter_read_seconds_total",
    "adapter_read_failures": "adapter_read_failures_total",
    "adapter_evictions": "adapter_evictions_total",
    "adapter_turns": "adapter_turns_total",
    "swaps": "swaps_total",
    "runtime_restarts": "runtime_restarts_total",
    "compositions": "compositions_total",
    "prefix_lookups": "prefix_lookups_total",
    "prefix_hits": "prefix_hits_total",
    "prefix_tokens": "prefix_tokens_total",
    "prefix_evictions": "prefix_evictions_total",
    "use_case_requests": "use_case_requests_total",
    "use_case_failures": "use_case_failures_total",
    "use_case_tokens": "use_case_tokens_total",
    **{ARM_PREFIX + name: ARM_PREFIX + name + TOTAL for name in ARM_COUNTS},
    **{SHADOW_PREFIX + name: SHADOW_PREFIX + name + TOTAL for name in SHADOW_COUNTS},
}


def serving_readings(metrics: Mapping[str, float]) -> list[Reading]:
    """What a host counts and measures, by name; `name.label` tells several of one kind apart."""
    return [_reading(n, v) for n, v in sorted(serving_metrics(metrics).items())]


def serving_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    return {_told(name): float(value) for name, value in metrics.items()}


def _told(name: str) -> str:
    kind, dot, label = name.partition(".")
    return f"{COUNTERS.get(kind, kind)}{dot}{label}"


def _reading(name: str, value: float) -> Reading:
    kind, _, label = name.partition(".")
    return Reading(kind, value, label)
