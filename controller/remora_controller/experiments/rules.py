"""Rules for promotion: `candidate.failures / candidate.requests < 0.01`. Pure.

A rule is a gate's check over one device that stands for all, whose metrics are the sums of what
arms counted: ARM.COUNT, and shadow.COUNT of the shadow's candidate. `judge` decides, as for any
gate. Where an arm that a rule names has fewer requests than `min_requests`, or the shadow fewer
comparisons, the rule is INCONCLUSIVE whatever the numbers are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from remora_contract.errors import RequestInvalid
from remora_contract.experiments import (
    ARM_COUNTS,
    ARM_PREFIX,
    SHADOW,
    SHADOW_COUNTS,
    SHADOW_PREFIX,
    Experiment,
    PromotionRule,
)
from remora_controller.experiments.statistics import answers
from remora_controller.gates.evaluate import DeviceEvidence, Samples
from remora_controller.gates.judge import Outcome, Verdict, WaveEvidence, judge, parsed
from remora_controller.gates.syntax import Measured, leaves, metrics_of

Counts = Mapping[str, Mapping[str, float]]  # by arm: experiment_requests and so on
_ANSWERS = "answers"  # not told by devices: requests that neither failed nor were cancelled
_ARM_COUNTS = (*ARM_COUNTS, _ANSWERS)
_EVERYWHERE = "all devices"
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def check_rules(experiments: Iterable[Experiment]) -> None:
    """Raises RequestInvalid naming the rule, for a check that cannot be read or that names what no
    arm counts, and for promotion by itself of nobody in particular."""
    for experiment in experiments:
        for rule in experiment.promote:
            where = f"experiment {experiment.name}, rule {rule.name}"
            _check_rule(experiment, rule, where)
        if experiment.promote_when is not None and candidate_of(experiment) is None:
            raise RequestInvalid(
                f"experiment {experiment.name}: promote_when needs one arm that rules name beside "
                "the incumbent, so that it is clear which is promoted"
            )


def _check_rule(experiment: Experiment, rule: PromotionRule, where: str) -> None:
    try:
        condition = parsed(rule.check)
    except RequestInvalid as e:
        raise RequestInvalid(f"{where}: {e}{_quoting(experiment)}") from e
    known = _known(experiment)
    for leaf, is_baseline in leaves(condition):
        if not isinstance(leaf, Measured) or is_baseline or leaf.function != "avg":
            raise RequestInvalid(f"{where}: a rule names plain counts, such as {sorted(known)[0]}")
        if leaf.metric not in known:
            raise RequestInvalid(f"{where}: {_unknown(experiment, leaf.metric)}")
    if not metrics_of(condition):
        raise RequestInvalid(f"{where}: it names no count, so it would hold without evidence")


def _known(experiment: Experiment) -> set[str]:
    shadow = SHADOW_COUNTS if experiment.shadow is not None else ()
    arms = {f"{arm.name}.{count}" for arm in experiment.arms for count in _ARM_COUNTS}
    return arms | {f"{SHADOW}.{count}" for count in shadow}


def _unknown(experiment: Experiment, name: str) -> str:
    subject, _, count = name.partition(".")
    arms = [arm.name for arm in experiment.arms]
    if subject == SHADOW and experiment.shadow is None:
        return f"{name} is counted of a shadow, and the experiment has none"
    if subject not in (*arms, SHADOW):
        return f"no arm {subject[:80]!r} (there are {', '.join(arms)}){_quoting(experiment)}"
    counts = SHADOW_COUNTS if subject == SHADOW else _ARM_COUNTS
    return f"{subject} counts no {count[:80]!r} (it counts {', '.join(counts)})"


def _quoting(experiment: Experiment) -> str:
    """Advice where it may be needed: a dash is a minus, unless it is quoted."""
    odd = [arm.name for arm in experiment.arms if not _WORD.fullmatch(arm.name)]
    return f'; write "{odd[0]}.requests" with its quotes' if odd else ""


def named_by(rule: PromotionRule) -> frozenset[str]:
    """Arms, and `shadow`."""
    return frozenset(name.partition(".")[0] for name in metrics_of(parsed(rule.check)))


def judge_rules(experiment: Experiment, counts: Counts) -> tuple[Verdict, ...]:
    """Of every rule, in its order. The same counts give the same verdicts."""
    values = _values(experiment, counts)
    return tuple(_judged(rule, values, experiment.min_requests) for rule in experiment.promote)


def _values(experiment: Experiment, counts: Counts) -> dict[str, float]:
    values: dict[str, float] = {}
    for arm in experiment.arms:
        told = counts.get(arm.name, {})
        own = {count: told.get(ARM_PREFIX + count, 0.0) for count in ARM_COUNTS}
        own[_ANSWERS] = answers(own)
        values |= {f"{arm.name}.{count}": value for count, value in own.items()}
    if experiment.shadow is not None:
        told = counts.get(experiment.shadow.candidate, {})
        values |= {f"{SHADOW}.{c}": told.get(SHADOW_PREFIX + c, 0.0) for c in SHADOW_COUNTS}
    return values


def _judged(rule: PromotionRule, values: Mapping[str, float], least: int) -> Verdict:
    gate = replace(rule.gate(), min_samples=1)
    named = sorted(metrics_of(parsed(gate.check)))
    numbers = tuple((name, values[name]) for name in named)
    missing = [_lack(subject, values, least) for subject in sorted(named_by(rule))]
    if any(missing):
        why = "; ".join(filter(None, missing))
        return Verdict(gate, 0, Outcome.INCONCLUSIVE, why, 0, numbers)
    series = {name: (Samples((value,)),) for name, value in numbers}
    verdict = judge(gate, WaveEvidence(0, 1, devices=(DeviceEvidence(_EVERYWHERE, series),)))
    compared = {_plainly(name, named): value for name, value in verdict.numbers}
    detail = _plainly(verdict.detail, named)
    return replace(verdict, detail=detail, numbers=tuple({**compared, **dict(numbers)}.items()))


def _lack(subject: str, values: Mapping[str, float], least: int) -> str:
    """Empty where there is enough."""
    what = "compared" if subject == SHADOW else "requests"
    have = values[f"{subject}.{what}"]
    return "" if have >= least else f"{subject} has {have:.0f} of {least} {what}"


def _plainly(text: str, names: Sequence[str]) -> str:
    """One device's average is what it counted."""
    for name in names:
        text = text.replace(f"avg({name})", name)
    return text


def incumbent_of(experiment: Experiment) -> str | None:
    """The arm that the name means without the experiment, where one is."""
    if experiment.shadow is not None:
        return experiment.shadow.incumbent
    own = [a.name for a in experiment.arms if experiment.name in (a.adapter, a.use_case)]
    return own[0] if own else None


def candidate_of(experiment: Experiment) -> str | None:
    """The arm that is promoted where none is named; None where that is not clear."""
    if experiment.shadow is not None:
        return experiment.shadow.candidate
    incumbent = incumbent_of(experiment)
    others = [a.name for a in experiment.arms if a.name != incumbent]
    named = {name for rule in experiment.promote for name in named_by(rule)}
    found = [name for name in others if name in named] if named else others
    return found[0] if len(found) == 1 else None


def concerning(experiment: Experiment, arm: str) -> tuple[PromotionRule, ...]:
    """The rules that have to pass before an arm wins: those that name it, of a shadow's candidate
    also those of the shadow."""
    shadow = experiment.shadow
    names = {arm, *([SHADOW] if shadow is not None and arm == shadow.candidate else [])}
    return tuple(rule for rule in experiment.promote if named_by(rule) & names)


def outcome_for(experiment: Experiment, arm: str, verdicts: Sequence[Verdict]) -> Outcome | None:
    """Of all rules that concern it together; None where none does."""
    wanted = {rule.name for rule in concerning(experiment, arm)}
    found = {v.outcome for v in verdicts if v.gate.name in wanted}
    for outcome in (Outcome.FAIL, Outcome.INCONCLUSIVE, Outcome.PASS):
        if outcome in found:
            return outcome
    return None


def refusal_of(experiment: Experiment, arm: str, verdicts: Sequence[Verdict]) -> str | None:
    """Why an arm may not become what the name means; None: it may. Going back to what the name
    means anyway takes no proof."""
    if arm == incumbent_of(experiment):
        return None
    outcome = outcome_for(experiment, arm, verdicts)
    if outcome is Outcome.PASS:
        return None
    if outcome is None:
        return f"experiment {experiment.name} has no rule under promote that names arm {arm}"
    wanted = {rule.name for rule in concerning(experiment, arm)}
    said = [
        f"rule {v.gate.name} is {v.outcome.value}: {v.detail}"
        for v in verdicts
        if v.gate.name in wanted and v.outcome is not Outcome.PASS
    ]
    return "; ".join(said)
