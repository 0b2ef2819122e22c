"""Gates and their verdicts: remora.operator.v1 <-> domain. Pure."""

from __future__ import annotations

from typing import Any

from remora_contract.gates import Gate
from remora_contract.strict import parse
from remora_controller.gates.judge import Verdict
from remora_protos.operator.v1 import operator_pb2 as pb


def gate_of(message: pb.Gate) -> Gate:
    """0 and "" stand for the default, as the protocol says. Raises DocumentInvalid."""
    said: dict[str, Any] = {
        "name": message.name,
        "check": message.check,
        "on_fail": message.on_fail,
        "min_devices": message.min_devices,
        "min_samples": message.min_samples,
        "scope": message.scope,
        "max_failing": message.max_failing,
    }
    needed = ("name", "check")
    return parse(Gate, {k: v for k, v in said.items() if v or k in needed}, "gate")


def gate_message(gate: Gate) -> pb.Gate:
    return pb.Gate(**vars(gate))


def verdict_message(verdict: Verdict) -> pb.GateVerdict:
    return pb.GateVerdict(
        gate=gate_message(verdict.gate),
        wave=verdict.wave,
        verdict=verdict.outcome.value,
        detail=verdict.detail,
        devices=verdict.devices,
        numbers=[pb.GateNumber(expression=name, value=value) for name, value in verdict.numbers],
    )
