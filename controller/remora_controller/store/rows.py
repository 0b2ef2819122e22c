"""Rows <-> domain values. Owns the JSON of the document columns; knows no SQL."""

from __future__ import annotations

import functools
import json
from typing import Any

from remora_contract.device_phase import Phase
from remora_contract.held import Held
from remora_contract.strict import parse, plain
from remora_controller.domain import (
    Assignment,
    BootTrail,
    Device,
    Facts,
    Member,
    ReleaseRecord,
    Report,
    RolloutRecord,
    RolloutSpec,
    RolloutState,
    ServingAdapter,
)
from remora_controller.gates.evaluate import Samples, Series

Row = dict[str, Any]


def dumps(document: object) -> str:
    return json.dumps(plain(document), separators=(",", ":"), ensure_ascii=False)


def device_row(device: Device) -> Row:
    return {
        "device_id": device.device_id,
        "enrolled_at": device.enrolled_at,
        "key_fingerprint": device.key_fingerprint,
        "hostname": device.facts.hostname,
        "facts": dumps(device.facts),
        "device_labels": dumps(device.device_labels),
        "operator_labels": dumps(device.operator_labels),
        "report": dumps(device.report),
        "held": dumps(device.held),
        "progress": device.report.progress,
        "trail": dumps(device.trail),
        "last_seen": device.last_seen,
        "events_up_to": device.events_up_to,
        "quarantine": device.quarantine,
        "quarantined_by": device.quarantined_by,
        "pin": device.pin,
        "removed_at": device.removed_at,
    }


def device_of(row: Row) -> Device:
    return Device(
        device_id=row["device_id"],
        enrolled_at=row["enrolled_at"],
        key_fingerprint=row["key_fingerprint"],
        facts=Facts(**json.loads(row["facts"])),
        device_labels=json.loads(row["device_labels"]),
        operator_labels=json.loads(row["operator_labels"]),
        report=_report(json.loads(row["report"])),
        held=_held(row["held"]),
        trail=_trail(json.loads(row["trail"])),
        last_seen=row["last_seen"],
        events_up_to=row["events_up_to"],
        quarantine=row["quarantine"],
        quarantined_by=row["quarantined_by"],
        pin=row["pin"],
        removed_at=row["removed_at"],
    )


def error_text(report: Report) -> str:
    return ": ".join(part for part in (report.error_code, report.error_message) if part)


@functools.lru_cache(maxsize=1024)
def _held(text: str) -> Held:
    """Most devices of a fleet hold the same."""
    data = json.loads(text) if text else {}
    return Held(**{name: tuple(digests) for name, digests in data.items()})


def _report(data: Row) -> Report:
    adapters = tuple(ServingAdapter(**a) for a in data.pop("adapters", ()))
    return Report(**data, adapters=adapters)


def _trail(data: Row) -> BootTrail:
    return BootTrail(data["boot_id"], data["seq"], tuple(data["earlier"]))


def assignment_row(assignment: Assignment) -> Row:
    return {
        "device_id": assignment.device_id,
        "generation": assignment.generation,
        "release_id": assignment.release_id,
        "rollout_id": assignment.rollout_id,
        "soak_s": assignment.soak_s,
        "is_rollback": int(assignment.is_rollback),
        "created_at": assignment.created_at,
        "phase": assignment.phase.value if assignment.phase else None,
        "error": assignment.error,
        "served_at": assignment.served_at,
        "download_bytes_per_s": assignment.download_bytes_per_s,
    }


def assignment_of(row: Row) -> Assignment:
    return Assignment(
        device_id=row["device_id"],
        generation=row["generation"],
        release_id=row["release_id"],
        rollout_id=row["rollout_id"],
        soak_s=row["soak_s"],
        is_rollback=bool(row["is_rollback"]),
        created_at=row["created_at"],
        phase=Phase(row["phase"]) if row["phase"] else None,
        error=row["error"],
        served_at=row["served_at"],
        download_bytes_per_s=row["download_bytes_per_s"],
    )


def release_of(row: Row) -> ReleaseRecord:
    return ReleaseRecord(**row)


def release_row(release: ReleaseRecord) -> Row:
    return dict(vars(release))


def rollout_row(rollout: RolloutRecord) -> Row:
    return {
        **vars(rollout),
        "spec": dumps(rollout.spec),
        "state": rollout.state.value,
        "keep": int(rollout.keep),
        "needs_approval": int(rollout.needs_approval),
    }


def rollout_of(row: Row) -> RolloutRecord:
    return RolloutRecord(
        **{
            **row,
            "spec": parse(RolloutSpec, json.loads(row["spec"]), "rollouts.spec"),
            "state": RolloutState(row["state"]),
            "keep": bool(row["keep"]),
            "needs_approval": bool(row["needs_approval"]),
        }
    )


def member_of(row: Row) -> Member:
    return Member(
        row["device_id"],
        row["wave"],
        row["generation"],
        row["rollback_generation"],
        row["bucket"],
    )


def series_text(series: Series) -> str:
    return dumps({metric: [vars(s) for s in found] for metric, found in series.items()})


def series_of(text: str) -> Series:
    return {
        metric: tuple(Samples(tuple(s["values"]), s.get("base"), s["span_s"]) for s in found)
        for metric, found in json.loads(text).items()
    }
