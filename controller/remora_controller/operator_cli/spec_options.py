"""How a rollout should go, as options shared by `plan`, `rollout start` and `adapters ship`."""

from __future__ import annotations

from typing import Annotated

import typer

from remora_contract.errors import UsageWrong
from remora_protos.operator.v1 import operator_pb2 as pb

Wave = Annotated[
    list[str] | None,
    typer.Option(
        "--wave",
        help="Devices (5) or share (25%) reached by each wave, cumulative; repeat. The rest "
        "follows as a last wave (default: 1).",
        show_default=False,
    ),
]
Soak = Annotated[
    float, typer.Option(min=0, help="Seconds a device must stay healthy before it counts.")
]
Threshold = Annotated[
    float,
    typer.Option(min=0.01, max=1, help="Share of a wave that must succeed, else all go back."),
]
WaveTimeout = Annotated[
    float | None,
    typer.Option(
        min=1,
        help="Seconds a device may take before it counts as failed (default: 3600 + soak).",
        show_default=False,
    ),
]
MaxUnavailable = Annotated[
    int, typer.Option(min=0, help="Devices that may change at the same time; 0: a whole wave.")
]
SkipRefused = Annotated[
    bool, typer.Option("--skip-refused", help="Leave out devices that the plan refuses.")
]
Supersede = Annotated[
    bool, typer.Option("--supersede", help="Take devices over from rollouts still open.")
]
NeedsApproval = Annotated[
    bool, typer.Option("--needs-approval", help="Touch nothing before somebody else approves.")
]
DEFAULT_SOAK_S = 60.0


def spec_message(
    waves: list[str] | None,
    soak: float,
    threshold: float,
    wave_timeout: float | None,
    max_unavailable: int,
) -> pb.RolloutSpec:
    """Raises UsageWrong for a wave that cannot be read."""
    return pb.RolloutSpec(
        waves=[_wave(text) for text in waves or []],
        soak_s=soak,
        success_threshold=threshold,
        wave_timeout_s=wave_timeout or 0.0,
        max_unavailable=max_unavailable,
    )


def _wave(text: str) -> pb.Wave:
    number = text.strip().removesuffix("%")
    try:
        if text.strip().endswith("%") and 0 < float(number) <= 100:
            return pb.Wave(percent=float(number))
        if number == text.strip() and int(number) >= 1:
            return pb.Wave(count=int(number))
    except ValueError:
        pass  # told below, together with numbers out of range
    raise UsageWrong(f"--wave {text!r}: write a number of devices (5) or a share (25%)")
