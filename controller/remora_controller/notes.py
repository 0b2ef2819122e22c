"""What an operator should know about a device beside its status: clones, replacements, callers that
were turned away, releases it did not take. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from remora_controller.domain import Device, Report
from remora_controller.late_gates import LateState
from remora_controller.phases import UNSUCCESSFUL, parse_phase
from remora_controller.store.late import LateFlag

MAX_NOTE = 300
# Of a device that took a release after its waves.
_LATE = {
    LateState.SENT_BACK: "sent back by a gate",
    LateState.FAILED: "fails a gate",
    LateState.INCONCLUSIVE: "not judged by the gates",
}


def device_note(device: Device, replaced: Mapping[str, str], late: LateFlag | None = None) -> str:
    """One line with the next step; empty when all is well. `replaced` as `replacements` says."""
    if device.removed_at is not None:
        return "was removed and still calls: join it again with --force, or switch it off"
    if device.quarantine is not None and device.quarantined_by:
        return (
            f"quarantined by {device.quarantined_by} ({device.quarantine}): lift it with "
            "`remora devices quarantine --lift`"
        )
    if device.quarantine is not None:
        return f"one identity on two machines ({device.quarantine}): remove it, join each again"
    if device.device_id in replaced:
        return f"joined again as {replaced[device.device_id]}: remove this one"
    if device.pin is not None:
        return f"pinned: {device.pin}"
    if late is not None and late.state in _LATE:
        return _cut(f"{_LATE[late.state]} of rollout {late.rollout_id}: {late.detail}")
    return _did_not_take(device.report)


def _did_not_take(report: Report) -> str:
    """In a rollout its status tells that too; of a late joiner nothing else does."""
    if parse_phase(report.phase) not in UNSUCCESSFUL:
        return ""
    why = f"{report.error_code}: {report.error_message}" if report.error_code else "no reason told"
    running = report.running_release_id or "nothing"
    return _cut(f"{report.phase} {report.release_id} ({why}); runs {running}")


def _cut(note: str) -> str:
    return note if len(note) <= MAX_NOTE else note[: MAX_NOTE - 1] + "…"


def replacements(devices: Iterable[Device], last_seen: Mapping[str, float]) -> dict[str, str]:
    """Devices whose machine joined again, with the id it has now.

    A machine id alone says little: images are cloned with it, containers share it. So the host name
    must be the same too, and the older identity silent since before the newer one came."""
    machines: dict[tuple[str, str], list[Device]] = {}
    for device in devices:
        if device.facts.machine_id:
            machine = (device.facts.machine_id, device.facts.hostname)
            machines.setdefault(machine, []).append(device)
    found = {}
    for same in machines.values():
        found.update(_replaced(sorted(same, key=lambda d: d.enrolled_at), last_seen))
    return found


def _replaced(same: Sequence[Device], last_seen: Mapping[str, float]) -> dict[str, str]:
    """Of the identities of one machine, oldest first."""
    newest = same[-1]
    return {
        d.device_id: newest.device_id
        for d in same[:-1]
        if last_seen.get(d.device_id, d.enrolled_at) < newest.enrolled_at
    }
