"""A rollout as people see it: its state, its gates, and the devices that need looking at first."""

from __future__ import annotations

import time

from rich.console import Group, RenderableType
from rich.text import Text

from remora_contract.command_line import printable
from remora_controller.operator_cli import render
from remora_protos.operator.v1 import operator_pb2 as pb

# What an operator looks at first.
_URGENT = ("failed", "kept", "reverted", "updating", "soaking", "waiting", "offline", "apart")
_MAX_ROWS = 40


def rollout_view(found: pb.Rollout) -> Group:
    """Head line, counts, and the devices that need looking at first."""
    counts: dict[str, int] = {}
    for device in found.devices:
        counts[device.outcome] = counts.get(device.outcome, 0) + 1
    summary = Text("  ").join(
        Text.assemble(render.styled(word), f" {n}") for word, n in sorted(counts.items())
    )
    head = Text.assemble(
        (found.rollout_id, "bold"),
        " ",
        render.styled(found.state),
        f"  {found.release_id}  wave {found.wave}/{found.waves}",
        f"  ({printable(found.reason)})" if found.reason else "",
        _not_before(found),
        _bandwidth(found),
    )
    ordered = sorted(found.devices, key=lambda d: (_attention(d.outcome), d.wave, d.device_id))
    rows = [
        (d.device_id, str(d.wave), render.styled(d.outcome), _phase(d), _why(d)[:120])
        for d in ordered[:_MAX_ROWS]
    ]
    parts: list[RenderableType] = [
        head,
        summary,
        *([_gates(found)] if found.gates else []),
        render.table(("DEVICE", "WAVE", "OUTCOME", "PHASE", "ERROR"), rows),
    ]
    if len(ordered) > _MAX_ROWS:
        parts.append(f"… and {len(ordered) - _MAX_ROWS} more (--json shows all)")
    return Group(*parts)


def _not_before(found: pb.Rollout) -> str:
    at = found.spec.not_before_unix_s
    is_awaited = found.state in ("RUNNING", "AWAITING_APPROVAL", "PAUSED") and at > time.time()
    return f"  (touches nothing before {render.clock_time(at)})" if is_awaited else ""


def _bandwidth(found: pb.Rollout) -> str:
    total = found.spec.total_bytes_per_s
    return f"  (at most {render.size(total)}/s together)" if total else ""


def _gates(found: pb.Rollout) -> RenderableType:
    """Those of the newest wave, and those of earlier ones that do not pass."""
    shown = [g for g in found.gates if g.wave == found.wave or g.verdict == "FAIL"]
    rows = [
        (g.gate.name, str(g.wave), render.styled(g.verdict), g.gate.check, g.detail[:160])
        for g in shown
    ]
    return render.table(("GATE", "WAVE", "VERDICT", "CHECK", "BECAUSE"), rows)


def _attention(outcome: str) -> int:
    return _URGENT.index(outcome) if outcome in _URGENT else len(_URGENT)


def _why(device: pb.RolloutDevice) -> str:
    if device.error or device.hold or not device.late:
        return device.error or device.hold
    late = f"late: {device.late}"
    return f"{late}: {device.late_detail}" if device.late_detail else late


def _phase(device: pb.RolloutDevice) -> str:
    if 0 < device.progress < 1:
        return f"{device.phase} {device.progress:.0%}"
    return device.phase or "-"
