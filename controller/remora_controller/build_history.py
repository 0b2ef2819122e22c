"""How long engine builds took, from what devices told of them. Reads events; decides nothing."""

from __future__ import annotations

import json
import statistics

from remora_controller.store.protocol import Store

_BUILDS_LOOKED_AT = 2000


def build_seconds(store: Store) -> dict[str, float]:
    """Median seconds of real engine builds by device model, from `engine.built` events."""
    models = {d.device_id: d.facts.device_model for d in store.devices()}
    seconds: dict[str, list[float]] = {}
    for event in store.events(None, _BUILDS_LOOKED_AT, "engine.built"):
        took = _built_seconds(event.detail_json)
        if took is not None and event.device_id in models:
            seconds.setdefault(models[event.device_id], []).append(took)
    return {model: statistics.median(values) for model, values in seconds.items()}


def _built_seconds(detail_json: str) -> float | None:
    try:
        detail = json.loads(detail_json)
    except ValueError:
        return None  # what a device says is not trusted to be JSON
    if not isinstance(detail, dict) or detail.get("from_cache"):
        return None
    seconds = detail.get("seconds")
    return float(seconds) if isinstance(seconds, (int, float)) and seconds >= 0 else None
