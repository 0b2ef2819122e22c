"""remora.control.v1 messages <-> the agent's own values. Pure; bounds what comes from outside."""

from __future__ import annotations

import math
from collections.abc import Iterable

from remora_agent.control.activation import Desired
from remora_agent.control.reconcile import Report
from remora_agent.control.spool import SpooledEvent
from remora_agent.host import ServingState
from remora_agent.telemetry.spool import Sample
from remora_contract.device_phase import MAX_SOAK_S
from remora_contract.errors import DocumentInvalid
from remora_protos.control.v1 import control_pb2 as pb

MAX_RELEASE_BYTES = 4 << 20
_SYNC_AFTER_S = (0.05, 3600.0)
_MOST_SAMPLE_S = 3600.0
_MAX_MESSAGE = 2000
_MAX_HOLD = 256


def desired_from(message: pb.DesiredState) -> Desired:
    """Raises DocumentInvalid for values no controller sends."""
    if message.generation < 1:
        raise DocumentInvalid("an assignment has a generation of at least 1")
    if len(message.release_json) > MAX_RELEASE_BYTES:
        raise DocumentInvalid(f"release document of {len(message.release_json)} bytes is too large")
    if not 0 <= message.soak_s <= MAX_SOAK_S:
        raise DocumentInvalid(f"soak_s {message.soak_s} is outside 0..{MAX_SOAK_S:.0f}")
    try:
        text = message.release_json.decode()
    except UnicodeDecodeError as e:
        raise DocumentInvalid("the release document is not UTF-8") from e
    return Desired(
        generation=message.generation,
        release_id=message.release_id or None,
        release_json=text,
        rollout_id=message.rollout_id,
        soak_s=message.soak_s,
        is_rollback=message.is_rollback,
        download_bytes_per_s=message.download_bytes_per_s or None,
        shares_bandwidth=message.shares_bandwidth,
    )


def next_sync_s(answer: pb.SyncResponse) -> float:
    """What the controller asked for, within reason."""
    seconds = answer.next_sync_after_s
    least, most = _SYNC_AFTER_S
    return min(most, max(least, seconds)) if math.isfinite(seconds) and seconds > 0 else 30.0


def sample_every_s(answer: pb.SyncResponse) -> float:
    """How close together samples are wanted, within reason; 0: all."""
    seconds = answer.sample_every_s
    return min(_MOST_SAMPLE_S, seconds) if math.isfinite(seconds) and seconds > 0 else 0.0


def reported(report: Report, serving: ServingState | None) -> pb.ReportedState:
    message = pb.ReportedState(progress=min(1.0, max(0.0, report.progress)))
    record = report.record
    if record is not None:
        message.phase = record.phase.value
        message.generation = record.desired.generation
        message.release_id = record.desired.release_id or ""
        message.error_code = record.error_code
        message.error_message = record.error_message[:_MAX_MESSAGE]
    if report.hold is not None:
        message.hold = report.hold.why[:_MAX_HOLD]
        message.hold_until_unix_s = report.hold.until_unix_s or 0.0
    if serving is not None:
        message.running_release_id = serving.release_id
        message.bundle_digest = serving.bundle_digest
        for a in serving.adapters:
            message.adapters.add(name=a.name, revision=a.revision, digest=a.digest, epoch=a.epoch)
    return message


def event_messages(events: Iterable[SpooledEvent]) -> list[pb.DeviceEvent]:
    return [
        pb.DeviceEvent(seq=e.seq, at_unix_s=e.at_unix_s, name=e.name, detail_json=e.detail_json)
        for e in events
    ]


def metric_messages(samples: Iterable[Sample]) -> list[pb.Metric]:
    """Numbers only: JSON and charts downstream have no NaN."""
    return [
        pb.Metric(name=s.name, value=s.value, at_unix_s=s.at_unix_s)
        for s in samples
        if math.isfinite(s.value)
    ]
