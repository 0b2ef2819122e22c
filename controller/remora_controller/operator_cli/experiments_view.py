"""Experiments as people see them: arms, shadow and rules, and as JSON with what counts come to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from remora_contract.command_line import printable
from remora_controller.experiments.statistics import arm_statistics, shadow_statistics
from remora_controller.operator_cli import render
from remora_protos.operator.v1 import operator_pb2 as pb

_ARM = (
    "ARM",
    "ANSWERS WITH",
    ">SHARE",
    "IDENTITY",
    ">DEVICES",
    ">REQUESTS",
    ">FAILED",
    ">CANCELLED",
    ">TOKENS",
    ">TTFT",
    ">ANSWER",
    ">UNKEYED",
)
_SHADOW = (
    "SHADOW OF",
    ">OFFERED",
    ">SKIPPED",
    ">CANCELLED",
    ">FAILED",
    ">COMPARED",
    ">EXACT",
    ">PREFIX",
    ">AGREEMENT",
    ">NLL DELTA",
)


def as_data(found: pb.Experiment) -> dict[str, Any]:
    """Every field, and what the counts come to; null where nothing was counted."""
    data: dict[str, Any] = render.plain(found)
    for arm, message in zip(data["arms"], found.arms, strict=True):
        arm["statistics"] = arm_statistics(message.counts)
        shadow = shadow_statistics(message.shadow) if message.shadow else None
        arm["shadow_statistics"] = shadow
    return data


def listed(experiments: Iterable[pb.Experiment]) -> RenderableType:
    """A line for each arm."""
    rows: list[Sequence[str | Text]] = []
    for e in experiments:
        for arm in e.arms:
            verdict = e.verdict if arm.name == e.candidate else ""
            rows.append([e.name, *_arm_row(arm), render.styled(verdict)])
    return render.table(("EXPERIMENT", *_ARM, "RULES"), rows)


def experiment_view(found: pb.Experiment) -> Group:
    more = len(found.release_ids) - 1
    releases = found.release_ids[0] + (f" and {more} more" if more else "")
    head = Text.assemble(
        (printable(found.name), "bold"),
        f"  in {releases}  on {found.devices} devices",
        f"  salt {printable(found.salt)}" if found.salt else "",
    )
    parts: list[RenderableType] = [head, render.table(_ARM, map(_arm_row, found.arms))]
    shadowed = [arm for arm in found.arms if arm.shadow]
    if shadowed:
        parts.append(render.table(_SHADOW, [_shadow_row(found, arm) for arm in shadowed]))
    if found.rules:
        parts.append(rules_table(found.rules))
    parts.append(_advice(found))
    return Group(*parts)


def rules_table(rules: Iterable[pb.GateVerdict]) -> RenderableType:
    rows = [
        (v.gate.name, render.styled(v.verdict), v.gate.check, v.detail[:160], _counts(v.numbers))
        for v in rules
    ]
    return render.table(("RULE", "VERDICT", "CHECK", "BECAUSE", "COUNTS"), rows)


def _arm_row(arm: pb.ExperimentArm) -> tuple[str, ...]:
    counts, statistics = arm.counts, arm_statistics(arm.counts)
    return (
        arm.name,
        arm.adapter or f"use case {arm.use_case}",
        f"{arm.percent:g} %",
        arm.identity,
        str(arm.devices),
        _count(counts.get("requests")),
        _count(counts.get("failures")),
        _count(counts.get("cancelled")),
        _count(counts.get("tokens")),
        _number(statistics["mean_first_token_s"], "{:.3f} s"),
        _number(statistics["mean_answer_s"], "{:.3f} s"),
        _count(counts.get("unkeyed")),
    )


def _shadow_row(found: pb.Experiment, arm: pb.ExperimentArm) -> tuple[str, ...]:
    counts, statistics = arm.shadow, shadow_statistics(arm.shadow)
    shares = [_number(statistics[name], "{:.2%}") for name in ("exact", "prefix", "agreement")]
    names = ("offered", "skipped", "cancelled", "failed", "compared")
    return (
        f"{found.incumbent} by {arm.name}",
        *(_count(counts.get(name)) for name in names),
        *shares,
        _number(statistics["nll_delta"], "{:+.4f}"),
    )


def _advice(found: pb.Experiment) -> Text:
    """What an operator may do next."""
    if not found.candidate:
        return Text("no arm is the candidate: promote one by name with --arm")
    if not found.verdict:
        return Text(f"no rule names {printable(found.candidate)}: nothing promotes it but --force")
    said = Text.assemble(f"{printable(found.candidate)}: ", render.styled(found.verdict))
    if found.verdict != "PASS":
        return said
    by_itself = "the controller promotes it by itself"
    command = f"`remora experiments promote {printable(found.name)}` makes it what the name means"
    return said.append(f"; {by_itself if found.promote_when else command}")


def _counts(numbers: Iterable[pb.GateNumber]) -> str:
    """What the verdict's own numbers were computed from."""
    counts = [n for n in numbers if " " not in n.expression]
    return ", ".join(f"{n.expression} = {n.value:.6g}" for n in counts)


def _count(value: float | None) -> str:
    return f"{value or 0:.0f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
