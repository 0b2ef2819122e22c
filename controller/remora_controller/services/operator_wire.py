"""remora.operator.v1 <-> domain. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from remora_contract.device_phase import Phase
from remora_contract.errors import DocumentInvalid, RequestInvalid
from remora_controller.domain import (
    Assignment,
    Device,
    MetricPoint,
    ReleaseRecord,
    RolloutRecord,
    RolloutSpec,
    RolloutState,
    StoredEvent,
    Wave,
)
from remora_controller.late_gates import LateState
from remora_controller.operations import RolloutDetail
from remora_controller.planner import DevicePlan, Plan
from remora_controller.release_diff import Difference
from remora_controller.repository import Published
from remora_controller.rollout import Attempt, MemberView, Standing, standing
from remora_controller.services.gate_wire import gate_message, gate_of, verdict_message
from remora_controller.store.protocol import MemberState
from remora_protos.operator.v1 import operator_pb2 as pb

MAX_WAVES = 64


def spec_of(message: pb.RolloutSpec) -> RolloutSpec:
    """0 stands for the default, as the protocol says. Raises RequestInvalid."""
    if len(message.waves) > MAX_WAVES:
        raise RequestInvalid(f"a rollout has at most {MAX_WAVES} waves")
    base = RolloutSpec()
    try:
        return RolloutSpec(
            waves=tuple(_wave_of(w) for w in message.waves) or base.waves,
            soak_s=message.soak_s,
            success_threshold=message.success_threshold or base.success_threshold,
            wave_timeout_s=message.wave_timeout_s or base.wave_timeout_s + message.soak_s,
            max_unavailable=message.max_unavailable or None,
            gates=tuple(gate_of(g) for g in message.gates),
            stratify=tuple(message.stratify),
            not_before=message.not_before_unix_s or None,
            windows=tuple(message.windows),
            download_bytes_per_s=message.download_bytes_per_s or None,
            total_bytes_per_s=message.total_bytes_per_s or None,
        )
    except (ValueError, DocumentInvalid) as e:
        raise RequestInvalid(str(e)) from e


def _wave_of(message: pb.Wave) -> Wave:
    return Wave(message.count or None, message.percent or None)


def spec_message(spec: RolloutSpec) -> pb.RolloutSpec:
    return pb.RolloutSpec(
        waves=[pb.Wave(count=w.count or 0, percent=w.percent or 0.0) for w in spec.waves],
        soak_s=spec.soak_s,
        success_threshold=spec.success_threshold,
        wave_timeout_s=spec.wave_timeout_s,
        max_unavailable=spec.max_unavailable or 0,
        gates=map(gate_message, spec.gates),
        stratify=spec.stratify,
        not_before_unix_s=spec.not_before or 0.0,
        windows=spec.windows,
        download_bytes_per_s=spec.download_bytes_per_s or 0,
        total_bytes_per_s=spec.total_bytes_per_s or 0,
    )


def status_of(device: Device, is_online: bool) -> str:
    if device.removed_at is not None:
        return "removed"
    if device.quarantine is not None:
        return "quarantined"
    return "online" if is_online else "offline"


def device_message(
    device: Device,
    assignment: Assignment | None,
    last_seen: float | None,
    is_online: bool,
    note: str,
) -> pb.Device:
    report, facts = device.report, device.facts
    return pb.Device(
        device_id=device.device_id,
        hostname=facts.hostname,
        labels=device.labels,
        status=status_of(device, is_online),
        phase=report.phase,
        assigned_release_id=assignment.release_id or "" if assignment else "",
        running_release_id=report.running_release_id,
        generation=assignment.generation if assignment else 0,
        last_seen_unix_s=last_seen or 0.0,
        device_model=facts.device_model,
        agent_version=facts.agent_version,
        architecture=facts.architecture,
        memory_bytes=facts.memory_bytes,
        error_code=report.error_code,
        error_message=device.quarantine or report.error_message,
        progress=report.progress,
        note=note,
        pin=device.pin or "",
        quarantined_by=device.quarantined_by,
        bundle_digest=report.bundle_digest,
        adapters=[
            pb.DeviceAdapter(name=a.name, revision=a.revision, digest=a.digest)
            for a in report.adapters
        ],
        hold=report.hold,
    )


def artifact_message(published: Published) -> pb.Artifact:
    return pb.Artifact(
        digest=published.digest,
        kind=published.kind,
        name=published.name,
        revision=published.revision,
        bytes=published.bytes,
        base_digest=published.base_digest,
        published_at_unix_s=published.published_at,
    )


def difference_message(difference: Difference) -> pb.ReleaseDifference:
    return pb.ReleaseDifference(
        path=difference.path, before=difference.before or "", after=difference.after or ""
    )


def release_message(release: ReleaseRecord) -> pb.ReleaseInfo:
    return pb.ReleaseInfo(
        release_id=release.release_id,
        name=release.name,
        release_json=release.document,
        created_at_unix_s=release.created_at,
        created_by=release.created_by,
    )


def plan_message(plan: Plan, sharing: str) -> pb.PlanResponse:
    return pb.PlanResponse(
        devices=[_device_plan_message(d) for d in plan.devices],
        waves=[f"wave {n}: {size} devices" for n, size in enumerate(plan.waves, start=1)],
        total_bytes=plan.total_bytes,
        engine_sharing=sharing,
    )


def _device_plan_message(plan: DevicePlan) -> pb.DevicePlan:
    return pb.DevicePlan(
        device_id=plan.device_id,
        hostname=plan.hostname,
        wave=plan.wave or 0,
        ship_bytes=plan.ship_bytes,
        builds_engine=plan.builds_engine,
        build_s=plan.build_s or 0.0,
        build_s_known=plan.build_s is not None,
        peak_disk_bytes=plan.peak_disk_bytes,
        refusals=[
            pb.PlanRefusal(code=r.code, need=r.need, have=r.have, message=str(r))
            for r in plan.refusals
        ],
        engine=plan.engine.what,
        engine_why=plan.engine.why,
        engine_from=plan.engine.source or "",
        engine_bytes=plan.engine.bytes or 0,
        shares_engine=plan.engine.shares,
        peak_memory_bytes=plan.peak_memory_bytes or 0,
    )


def rollout_message(detail: RolloutDetail, now: float) -> pb.Rollout:
    states = {s.member.device_id: s for s in detail.states}
    message = rollout_summary(detail.record, detail.release_name)
    message.devices.extend(
        _rollout_device(m, states[m.device_id], detail.record, now)
        for m in detail.view.members
        if m.device_id in states
    )
    message.gates.extend(map(verdict_message, detail.view.verdicts))
    return message


def rollout_summary(record: RolloutRecord, release_name: str) -> pb.Rollout:
    """Without its devices: a list of rollouts of a large fleet must stay small."""
    return pb.Rollout(
        rollout_id=record.rollout_id,
        release_id=record.release_id,
        release_name=release_name,
        selector=record.selector,
        state=record.state.value,
        reason=record.reason,
        wave=record.wave,
        waves=record.waves,
        spec=spec_message(record.spec),
        created_at_unix_s=record.created_at,
        created_by=record.created_by,
        retry_of=record.retry_of or "",
        attempt=record.attempt,
        approved_by=record.approved_by,
    )


def _rollout_device(
    member: MemberView, state: MemberState, rollout: RolloutRecord, now: float
) -> pb.RolloutDevice:
    attempt, spec = member.back or member.forward, rollout.spec
    phase = attempt.phase if attempt else None
    outcome = outcome_of(member, spec, now)
    if rollout.state is RolloutState.SUPERSEDED and outcome in _UNFINISHED:
        return pb.RolloutDevice(
            device_id=member.device_id,
            hostname=state.hostname,
            wave=member.wave,
            outcome="apart",
            phase=phase.value if phase else "",
            error=rollout.reason,
        )
    return pb.RolloutDevice(
        device_id=member.device_id,
        hostname=state.hostname,
        wave=member.wave,
        outcome=outcome,
        phase=phase.value if phase else "",
        progress=state.progress if outcome in ("updating", "soaking") else 0.0,
        error=_error(outcome, attempt, state.error or _sent_back(state), spec),
        hold=state.hold if phase is Phase.WAIT_WINDOW else "",
        late=state.late.value if state.late is not None else "",
        late_detail=state.late_detail,
    )


def _sent_back(state: MemberState) -> str:
    return state.late_detail if state.late is LateState.SENT_BACK else ""


def _error(outcome: str, attempt: Attempt | None, reported: str, spec: RolloutSpec) -> str:
    if outcome == "kept":
        kept = "no earlier release to return to: it keeps what it runs"
        return f"{reported}; {kept}" if reported else kept
    if outcome == "apart":
        return "removed, quarantined or relabelled"
    if outcome == "failed" and attempt is not None and not attempt.is_settled:
        return f"did not end within {spec.wave_timeout_s:.0f} s"
    return reported if outcome in ("failed", "reverted") else ""


_UNFINISHED = ("waiting", "offline", "updating", "soaking")
_OUTCOMES = {
    Standing.WAITING: "waiting",
    Standing.CHANGING: "updating",
    Standing.SUCCEEDED: "succeeded",
    Standing.FAILED: "failed",
    Standing.APART: "offline",
}


def outcome_of(member: MemberView, spec: RolloutSpec, now: float) -> str:
    """One word for people; see RolloutDevice.outcome."""
    if member.back is not None:
        if member.back.is_nothing:
            return "kept"
        if member.back.phase is Phase.COMMITTED:
            return "reverted"
        return "failed" if member.back.is_settled else "updating"
    if member.forward is not None and member.forward.phase is Phase.REVERTED:
        return "reverted"
    if member.forward is not None and member.forward.phase is Phase.SOAKING:
        return "soaking"
    found = standing(member, spec, now)
    return "apart" if found is Standing.APART and not member.is_eligible else _OUTCOMES[found]


def top_row(device: pb.Device, metrics: Mapping[str, MetricPoint]) -> pb.TopRow:
    return pb.TopRow(
        device=device,
        metrics={name: point.value for name, point in metrics.items()},
        metrics_at_unix_s=max((p.at for p in metrics.values()), default=0.0),
    )


def event_message(event: StoredEvent) -> pb.Event:
    return pb.Event(
        at_unix_s=event.at,
        device_id=event.device_id,
        name=event.name,
        detail_json=event.detail_json,
    )
