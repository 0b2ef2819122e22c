"""remora.control.v1 <-> domain, with every bound on what a device may send. Pure.

A message that is too large is refused. Text for people is cut, and an event or metric that cannot
be stored as it is does not stop the Sync that carries it: the device would send it for ever.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence, Sized

from remora_contract.engine import MAX_FIELD_TEXT, MAX_KEY_FIELDS
from remora_contract.errors import RequestInvalid
from remora_contract.held import MAX_HELD, Held
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
_METRIC_NAME = re.compile(r"[\x20-\x7e]{1,160}")
_NOT_IN_EVENT = re.compile(r"[^A-Za-z0-9_.-]")
_MAX_INT = (1 << 63) - 1


def facts_of(message: pb.DeviceFacts) -> Facts:
    """Raises RequestInvalid naming the field."""
    _count("backends", message.backends, MAX_BACKENDS)
    _count("engine_key fields", message.engine_key, MAX_KEY_FIELDS)
    return Facts(
        machine_id=message.machine_id[:MAX_TEXT],
        hostname=message.hostname[:MAX_TEXT],
        agent_version=message.agent_version[:MAX_TEXT],
        architecture=message.architecture[:MAX_TEXT],
        device_model=message.device_model[:MAX_TEXT],
        memory_bytes=_whole("memory_bytes", message.memory_bytes),
        disk_free_bytes=_whole("disk_free_bytes", message.disk_free_bytes),
        backends={k[:MAX_TEXT]: v[:MAX_TEXT] for k, v in sorted(message.backends.items())},
        cores=message.cores,
        engine_key={
            k[:MAX_TEXT]: v[:MAX_FIELD_TEXT] for k, v in sorted(message.engine_key.items())
        },
        engine_rows=message.engine_rows,
        engine_context=message.engine_context,
        memory_floor_bytes=_whole("memory_floor_bytes", message.memory_floor_bytes),
        disk_floor_bytes=_whole("disk_floor_bytes", message.disk_floor_bytes),
        gpu_memory_bytes=_whole("gpu_memory_bytes", message.gpu_memory_bytes),
        gpu_shares_memory=message.gpu_shares_memory,
    )


def held_of(message: pb.HeldArtifacts) -> Held:
    """Raises RequestInvalid for too many, or what is no digest."""
    return Held(
        _digests("kept", message.kept),
        _digests("loose", message.loose),
        _digests("built", message.built),
    )


def _digests(name: str, found: Sequence[bytes]) -> tuple[str, ...]:
    _count(f"{name} artifacts", found, MAX_HELD)
    if any(len(digest) != 32 for digest in found):
        raise RequestInvalid(f"{name} artifacts: a digest is 32 bytes")
    return tuple(sorted(f"sha256:{digest.hex()}" for digest in found))


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
        error_code=message.error_code[:MAX_TEXT],
        error_message=message.error_message[:MAX_MESSAGE],
        progress=min(1.0, max(0.0, progress)),
        hold=message.hold[:MAX_TEXT],
        hold_until=message.hold_until_unix_s if math.isfinite(message.hold_until_unix_s) else 0.0,
    )


def events_of(events: Sequence[pb.DeviceEvent], now: float) -> tuple[DeviceEvent, ...]:
    """Raises RequestInvalid for too many. A device's clock may be wrong, not in the future."""
    _count("events", events, MAX_EVENTS)
    return tuple(_event_of(e, now) for e in events)


def clock_ahead_s(request: pb.SyncRequest, now: float) -> float:
    """What the call says of how far the device's clock is ahead, less the call's own delay."""
    sent_at = request.sent_at_unix_s  # 0: not told
    return sent_at - now if math.isfinite(sent_at) and sent_at > 0 else 0.0


def metrics_of(
    metrics: Sequence[pb.Metric], device_id: str, now: float, ahead_s: float
) -> tuple[MetricPoint, ...]:
    """Without values that are not finite and names nobody could type; in the controller's time.
    Raises RequestInvalid."""
    _count("metrics", metrics, MAX_METRICS)
    return tuple(
        MetricPoint(device_id, m.name, m.value, _past(m.at_unix_s - ahead_s, now))
        for m in metrics
        if math.isfinite(m.value) and _METRIC_NAME.fullmatch(m.name)
    )


def desired_of(
    assignment: Assignment, release_json: bytes, *, shares_bandwidth: bool = False
) -> pb.DesiredState:
    return pb.DesiredState(
        generation=assignment.generation,
        release_id=assignment.release_id or "",
        release_json=release_json,
        rollout_id=assignment.rollout_id or "",
        soak_s=assignment.soak_s,
        is_rollback=assignment.is_rollback,
        download_bytes_per_s=assignment.download_bytes_per_s or 0,
        shares_bandwidth=shares_bandwidth,
    )


def fetching_of(message: pb.Fetching) -> tuple[int | None, int]:
    """The device's own limit, and the share it holds. Raises RequestInvalid."""
    limit = _whole("limit_bytes_per_s", message.limit_bytes_per_s)
    return limit or None, _whole("share_bytes_per_s", message.share_bytes_per_s)


def _adapter_of(message: pb.ServingAdapter) -> ServingAdapter:
    return ServingAdapter(
        name=_text("adapter name", message.name),
        revision=_text("adapter revision", message.revision),
        digest=_text("adapter digest", message.digest),
        epoch=_whole("epoch", message.epoch),
    )


def _event_of(message: pb.DeviceEvent, now: float) -> DeviceEvent:
    name = _NOT_IN_EVENT.sub("_", message.name)[:64] or "unnamed"
    return DeviceEvent(
        seq=_whole("event seq", message.seq),
        at=_past(message.at_unix_s, now),
        name=name,
        detail_json=_detail(message.detail_json or "{}"),
    )


def _detail(text: str) -> str:
    if len(text) > MAX_DETAIL:
        return json.dumps({"left_out": f"{len(text)} characters"})
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return json.dumps({"not_json": text[:MAX_TEXT]})
    return text


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
