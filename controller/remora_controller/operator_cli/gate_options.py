"""Gates and schedule of a rollout, as options of `rollout start`. Pure.

`--gate 'ttft: p95(ttft_s) < 0.8 on_fail=rollback min_devices=3'`: a name, a check, and behind it
what the gate says otherwise than by default.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any

import typer

from remora_contract.errors import DocumentInvalid, RequestInvalid, UsageWrong
from remora_contract.gates import Gate
from remora_contract.strict import parse
from remora_contract.windows import parse_window
from remora_controller.gates.syntax import parse_check
from remora_controller.services.gate_wire import gate_message
from remora_protos.operator.v1 import operator_pb2 as pb

GateOption = Annotated[
    list[str] | None,
    typer.Option(
        "--gate",
        help="What must hold while the release serves, beside the release's own gates: "
        "'NAME: CHECK [on_fail=pause] [min_devices=3] [min_samples=3] [scope=device] "
        "[max_failing=0.1]', for example 'ttft: p95(ttft_s) < 0.8'; repeat.",
        show_default=False,
    ),
]
Stratify = Annotated[
    list[str] | None,
    typer.Option(
        help="Label key over whose values every wave is spread evenly, such as site; "
        "device_model and architecture need no label; repeat.",
        show_default=False,
    ),
]
NotBefore = Annotated[
    str | None,
    typer.Option(
        help="Touch no device before this time, such as 2026-05-01T02:00 (here) or "
        "2026-05-01T02:00+02:00.",
        show_default=False,
    ),
]
WindowOption = Annotated[
    list[str] | None,
    typer.Option(
        "--window",
        help="When devices may switch that have no maintenance-window label: 02:00-05:00, "
        "mon-fri@22:00-04:00 or sat@00:00-24:00@Europe/Berlin; repeat.",
        show_default=False,
    ),
]
DeviceBandwidth = Annotated[
    str | None,
    typer.Option(
        help="Most that each device downloads: bytes a second, or with K, M or G (500K).",
        show_default=False,
    ),
]
Bandwidth = Annotated[
    str | None,
    typer.Option(
        help="Most that all devices of this rollout download together: bytes a second, or with K, "
        "M or G (50M).",
        show_default=False,
    ),
]
_OPTION = re.compile(r"\s+(on_fail|min_devices|min_samples|scope|max_failing)=(\S+)\s*$")
_NUMBERS = {"min_devices": int, "min_samples": int, "max_failing": float}
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def add_to(
    spec: pb.RolloutSpec,
    gates: Sequence[Gate],
    stratify: Sequence[str],
    not_before: str | None,
    windows: Sequence[str],
    device_bandwidth: str | None,
    bandwidth: str | None,
) -> pb.RolloutSpec:
    """The spec with these. Raises UsageWrong for what cannot be read."""
    spec.gates.extend(map(gate_message, gates))
    spec.stratify.extend(stratify)
    spec.not_before_unix_s = 0.0 if not_before is None else _time(not_before)
    spec.windows.extend(map(_window, windows))
    spec.download_bytes_per_s = bytes_per_s("--device-bandwidth", device_bandwidth)
    spec.total_bytes_per_s = bytes_per_s("--bandwidth", bandwidth)
    return spec


def gate_of_text(text: str) -> Gate:
    """Raises UsageWrong."""
    name, colon, rest = text.partition(":")
    said: dict[str, Any] = {"name": name.strip()}
    while match := _OPTION.search(rest):
        if match[1] in said:
            raise UsageWrong(f"--gate {name}: {match[1]} is given twice")
        said[match[1]] = _option(name, match[1], match[2])
        rest = rest[: match.start()]
    if not colon or not rest.strip():
        raise UsageWrong(f"--gate {text!r}: write 'NAME: CHECK', such as 'ttft: p95(ttft_s) < 0.8'")
    try:
        gate = parse(Gate, {**said, "check": rest.strip()}, f"--gate {name}")
        parse_check(gate.check)
    except (DocumentInvalid, RequestInvalid) as e:
        raise UsageWrong(str(e)) from e
    return gate


def _option(name: str, key: str, value: str) -> object:
    try:
        return _NUMBERS[key](value) if key in _NUMBERS else value
    except ValueError as e:
        raise UsageWrong(f"--gate {name}: {key}={value} is no number") from e


def _time(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError) as e:
        raise UsageWrong(f"--not-before {text!r}: write a time such as 2026-05-01T02:00") from e


def _window(text: str) -> str:
    try:
        parse_window(text)
    except ValueError as e:
        raise UsageWrong(f"--window: {e}") from e
    return text


def bytes_per_s(option: str, text: str | None) -> int:
    """0 where nothing is said. Raises UsageWrong."""
    if text is None:
        return 0
    unit = _UNITS.get(text[-1:].upper(), 1)
    number = text[:-1] if unit > 1 else text
    try:
        return int(float(number) * unit)
    except (ValueError, OverflowError) as e:
        raise UsageWrong(f"{option} {text!r}: write bytes a second, such as 500K") from e
