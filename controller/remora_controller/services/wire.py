"""remora.control.v1 <-> domain, with every bound on what a device may send. Pure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sized
from typing import TypeVar

from remora_contract.errors import RequestInvalid
from remora_controller.domain import (
    Assignment,
    DeviceEvent,
    Facts,
    MetricPoint,
    Report,
    ServingAdapter,
)
from remora_controller.selector import check_label
from remora_protos.control.v1 import control_pb2 as pb

MAX_LABELS = 64
MAX_EVENTS = 1000
MAX_METRICS = 1000
MAX_ADAPTERS = 1024
MAX_BACKENDS = 32
MAX_TEXT = 256
MAX_MESSAGE = 4096
MAX_DETAIL = 16 << 10
_METRIC_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.:/{}=,\"-]{0,127}")
_EVENT_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAX_INT = (1 << 63) - 1
T = TypeVar("T")


def facts_of(message: pb.DeviceFacts) -> Facts:
    """Raises RequestInvalid naming the field."""
    _count("backends", message.backends, MAX_BACKENDS)
    return Facts(
        machine_id=_text("machine_id", message.machine_id),
        hostname=_text("hostname", message.hostname),
        agent_version=_text("agent_version", message.agent_version),
        architecture=_text("architecture", message.architecture),
        device_model=_text("device_model", message.device_model),
        memory_bytes=_whole("memory_bytes", message.memory_bytes),
        disk_free_bytes=_whole("disk_free_bytes", message.disk_free_bytes),
        backends={_text("backend", k): _text(k, v) for k, v in sorted(message.backends.items())},
        cores=message.cores,
    )


def labels_of(labels: Mapping[str, str]) -> dict[str, str]:
    """Raises RequestInvalid."""
    _count("labels", labels, MAX_LABELS)
    for key, value in labels.items():
        check_label(key, value)
    return dict(sorted(labels.items()))


def report_of(message: pb.ReportedState) -> Report:
    """Raises RequestInvalid naming the field."""
    _count("adapters", message.adapters, MAX_ADAPTERS)
    progress = message.progress if math.isfinite(message.progress) else 0.0
    return Report(
        phase=_text("phase", message.phase),
        generation=_whole("generation", message.generation),
        release_id=_text("release_id", message.release_id),
        running_release_id=_text("running_release_id", message.running_release_id),
        bundle_digest=_text("bundle_digest", message.bundle_digest),
        adapters=tuple(_adapter_of(a) for a in message.adapters),
        error_code=_text("error_code", message.error_code),
        error_message=message.error_message[:MAX_MESSAGE],
        progress=min(1.0, max(0.0, progress)),
    )


def events_of(events: Iterable[pb.DeviceEvent], now: float) -> tuple[DeviceEvent, ...]:
    """Raises RequestInvalid. A device's clock may be wrong, but not in the future."""
    return tuple(_event_of(e, now) for e in _bounded("events", events, MAX_EVENTS))


def metrics_of(metrics: Iterable[pb.Metric], device_id: str, now: float) -> tuple[MetricPoint, ...]:
    """Values that are not finite are left out: a gauge without a reading. Raises RequestInvalid."""
    points = []
    for metric in _bounded("metrics", metrics, MAX_METRICS):
        if not _METRIC_NAME.fullmatch(metric.name):
            raise RequestInvalid(f"metric name {metric.name[:80]!r} cannot be stored")
        if math.isfinite(metric.value):
            at = _past(metric.at_unix_s, now)
            points.append(MetricPoint(device_id, metric.name, metric.value, at))
    return tuple(points)


def desired_of(assignment: Assignment, release_json: bytes) -> pb.DesiredState:
    return pb.DesiredState(
        generation=assignment.generation,
        release_id=assignment.release_id or "",
        release_json=release_json,
        rollout_id=assignment.rollout_id or "",
        soak_s=assignment.soak_s,
        is_rollback=assignment.is_rollback,
    )


def _adapter_of(message: pb.ServingAdapter) -> ServingAdapter:
    return ServingAdapter(
        name=_text("adapter name", message.name),
        revision=_text("adapter revision", message.revision),
        digest=_text("adapter digest", message.digest),
        epoch=_whole("epoch", message.epoch),
    )


def _event_of(message: pb.DeviceEvent, now: float) -> DeviceEvent:
    if not _EVENT_NAME.fullmatch(message.name):
        raise RequestInvalid(f"event name {message.name[:80]!r} cannot be stored")
    detail = message.detail_json or "{}"
    if len(detail) > MAX_DETAIL:
        raise RequestInvalid(f"event {message.name}: its detail exceeds {MAX_DETAIL} characters")
    try:
        json.loads(detail)
    except (ValueError, RecursionError) as e:
        raise RequestInvalid(f"event {message.name}: its detail is not JSON") from e
    seq = _whole("event seq", message.seq)
    return DeviceEvent(seq, _past(message.at_unix_s, now), message.name, detail)


def _past(at: float, now: float) -> float:
    return min(at, now) if math.isfinite(at) and at > 0 else now


def _text(what: str, value: str) -> str:
    if len(value) > MAX_TEXT:
        raise RequestInvalid(f"{what} has at most {MAX_TEXT} characters, not {len(value)}")
    return value


def _whole(what: str, value: int) -> int:
    if value > _MAX_INT:
        raise RequestInvalid(f"{what} {value} is too large")
    return value


def _count(what: str, items: Sized, limit: int) -> None:
    if len(items) > limit:
        raise RequestInvalid(f"at most {limit} {what} at a time, not {len(items)}")


def _bounded(what: str, items: Iterable[T], limit: int) -> list[T]:
    found = list(items)
    _count(what, found, limit)
    return found
