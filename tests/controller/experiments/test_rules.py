"""Whether an arm may win: never without enough requests, never against a rule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_contract.errors import RequestInvalid
from remora_contract.experiments import (
    ARM_COUNTS,
    ARM_PREFIX,
    SHADOW_COUNTS,
    SHADOW_PREFIX,
    Arm,
    Experiment,
    PromotionRule,
    Shadow,
)
from remora_controller.experiments.rules import (
    candidate_of,
    check_rules,
    concerning,
    incumbent_of,
    judge_rules,
    outcome_for,
    refusal_of,
)
from remora_controller.experiments.statistics import arm_statistics, shadow_statistics
from remora_controller.gates.judge import Outcome

ARMS = (Arm("control", 90, adapter="sql"), Arm("candidate", 10, adapter="sql-2"))
SHADOWED = Shadow("control", "candidate", 25)
ERRORS = PromotionRule("errors", "candidate.failures / candidate.requests < 0.01")
FASTER = PromotionRule(
    "faster",
    "candidate.answer_seconds / candidate.requests < control.answer_seconds / control.requests",
)
ALIKE = PromotionRule("alike", "shadow.exact / shadow.compared >= 0.98")


def experiment(*rules: PromotionRule, **changes: object) -> Experiment:
    return Experiment("sql", ARMS, "s", promote=rules, **changes)  # type: ignore[arg-type]


def arm(requests: float, failures: float = 0.0, **more: float) -> dict[str, float]:
    counts = {"requests": requests, "failures": failures, **more}
    return {ARM_PREFIX + name: value for name, value in counts.items()}


def test_a_rule_passes_or_fails_by_the_sums_and_says_by_which() -> None:
    wanted = experiment(ERRORS)
    (good,) = judge_rules(wanted, {"candidate": arm(1000, 4)})
    assert good.outcome is Outcome.PASS
    assert dict(good.numbers) == {
        "(candidate.failures / candidate.requests)": 0.004,
        "candidate.failures": 4.0,
        "candidate.requests": 1000.0,
    }
    assert good.detail == "(candidate.failures / candidate.requests) = 0.004"
    (bad,) = judge_rules(wanted, {"candidate": arm(1000, 11)})
    assert bad.outcome is Outcome.FAIL
    assert refusal_of(wanted, "candidate", [bad]) == (
        "rule errors is FAIL: (candidate.failures / candidate.requests) = 0.011"
    )


def test_too_few_requests_of_any_arm_that_a_rule_names_are_no_evidence() -> None:
    wanted = experiment(FASTER, min_requests=50)
    counts = {"candidate": arm(49, answer_seconds=1), "control": arm(900, answer_seconds=900)}
    (few,) = judge_rules(wanted, counts)
    assert (few.outcome, few.detail) == (Outcome.INCONCLUSIVE, "candidate has 49 of 50 requests")
    counts["candidate"] = arm(50, answer_seconds=1)
    assert judge_rules(wanted, counts)[0].outcome is Outcome.PASS
    counts["control"] = arm(2, answer_seconds=900)
    assert "control has 2 of 50 requests" in judge_rules(wanted, counts)[0].detail


def test_an_arm_that_nobody_waits_for_is_not_fast() -> None:
    check = "candidate.answer_seconds / candidate.answers < 2"
    wanted = experiment(PromotionRule("fast", check))
    check_rules([wanted])
    (slow,) = judge_rules(wanted, {"candidate": arm(500, cancelled=490, answer_seconds=100)})
    assert slow.outcome is Outcome.FAIL
    (nobody,) = judge_rules(wanted, {"candidate": arm(500, cancelled=500)})
    assert nobody.outcome is Outcome.INCONCLUSIVE


def test_a_shadow_is_judged_by_its_comparisons() -> None:
    wanted = experiment(ALIKE, shadow=SHADOWED)
    told = {SHADOW_PREFIX + "compared": 99.0, SHADOW_PREFIX + "exact": 99.0, **arm(5000)}
    (few,) = judge_rules(wanted, {"candidate": told})
    assert (few.outcome, few.detail) == (Outcome.INCONCLUSIVE, "shadow has 99 of 100 compared")
    told[SHADOW_PREFIX + "compared"] = 100.0
    assert judge_rules(wanted, {"candidate": told})[0].outcome is Outcome.PASS
    told[SHADOW_PREFIX + "compared"] = 200.0
    assert judge_rules(wanted, {"candidate": told})[0].outcome is Outcome.FAIL
    assert concerning(wanted, "candidate") == (ALIKE,)
    assert concerning(wanted, "control") == ()


_COUNT = st.one_of(st.just(0.0), st.integers(0, 300).map(float))
_NAMES = [ARM_PREFIX + n for n in ARM_COUNTS] + [SHADOW_PREFIX + n for n in SHADOW_COUNTS]
_COUNTS = st.dictionaries(
    st.sampled_from(("control", "candidate")),
    st.dictionaries(st.sampled_from(_NAMES), _COUNT),
    max_size=2,
)
_RULES = st.lists(st.sampled_from((ERRORS, FASTER, ALIKE)), unique=True, max_size=3)


@given(_RULES, _COUNTS, st.integers(1, 200))
def test_nobody_wins_below_min_requests_or_against_a_rule(
    rules: list[PromotionRule], counts: dict[str, dict[str, float]], least: int
) -> None:
    wanted = experiment(*rules, shadow=SHADOWED, min_requests=least)
    verdicts = judge_rules(wanted, counts)
    assert verdicts == judge_rules(wanted, dict(reversed(counts.items())))
    assert [v.gate.name for v in verdicts] == [r.name for r in rules]
    if refusal_of(wanted, "candidate", verdicts) is not None:
        return
    assert rules and all(v.outcome is Outcome.PASS for v in verdicts)
    told = counts.get("candidate", {})
    if set(rules) & {ERRORS, FASTER}:
        assert told.get("experiment_requests", 0) >= least
    if FASTER in rules:
        assert counts.get("control", {}).get("experiment_requests", 0) >= least
    if ALIKE in rules:
        assert told.get("shadow_compared", 0) >= least


def test_without_a_rule_nobody_wins_and_going_back_needs_none() -> None:
    wanted = experiment()
    assert "no rule under promote that names arm candidate" in str(
        refusal_of(wanted, "candidate", [])
    )
    assert refusal_of(wanted, "control", []) is None
    failing = judge_rules(experiment(ERRORS), {"candidate": arm(1000, 1000)})
    assert refusal_of(experiment(ERRORS), "control", failing) is None


def test_a_rule_about_another_arm_stands_in_nobodys_way() -> None:
    arms = (*ARMS[:1], Arm("b", 5, adapter="b"), Arm("c", 5, adapter="c"))
    rules = tuple(PromotionRule(n, f"{n}.failures == 0") for n in ("b", "c"))
    wanted = Experiment("sql", arms, promote=rules)
    verdicts = judge_rules(wanted, {"b": arm(100), "c": arm(100, 1)})
    assert outcome_for(wanted, "b", verdicts) is Outcome.PASS
    assert refusal_of(wanted, "b", verdicts) is None
    assert refusal_of(wanted, "c", verdicts) is not None
    assert candidate_of(wanted) is None, "two could win: somebody has to say which"
    assert candidate_of(Experiment("sql", arms, promote=rules[:1])) == "b"


def test_who_is_the_incumbent_and_who_the_candidate() -> None:
    assert (incumbent_of(experiment()), candidate_of(experiment())) == ("control", "candidate")
    nameless = Experiment("ab", ARMS)
    assert (incumbent_of(nameless), candidate_of(nameless)) == (None, None)
    shadowed = Experiment("ab", ARMS, shadow=Shadow("candidate", "control", 5))
    assert (incumbent_of(shadowed), candidate_of(shadowed)) == ("candidate", "control")


@pytest.mark.parametrize(
    ("check", "why"),
    [
        ("candidat.failures < 1", "rule r: no arm 'candidat'"),
        ("candidate.errors < 1", "candidate counts no 'errors'"),
        ("shadow.exact > 1", "the experiment has none"),
        ("ttft_s < 1", "no arm 'ttft_s'"),
        ("error_rate < 1", "plain counts"),
        ("failed_devices < 1", "plain counts"),
        ("baseline(candidate.failures) < 1", "plain counts"),
        ("p95(candidate.failures) < 1", "plain counts"),
        ("1 < 2", "names no count"),
        ("candidate.failures", "expected a comparison"),
        ("candidate.failures <", "rule r: check"),
    ],
)
def test_a_rule_that_nobody_could_judge_is_refused_by_name(check: str, why: str) -> None:
    with pytest.raises(RequestInvalid, match=why) as e:
        check_rules([experiment(PromotionRule("r", check))])
    assert "experiment sql, rule r" in str(e.value)


def test_arms_with_dashes_stand_in_quotes() -> None:
    arms = (Arm("old-1", 50, adapter="a"), Arm("new-1", 50, adapter="b"))
    rule = PromotionRule("r", '"new-1.failures" == 0')
    wanted = Experiment("x", arms, promote=(rule,), min_requests=1)
    check_rules([wanted])
    assert judge_rules(wanted, {"new-1": arm(5)})[0].outcome is Outcome.PASS
    with pytest.raises(RequestInvalid, match=r'write "old-1\.requests" with'):
        check_rules([Experiment("x", arms, promote=(PromotionRule("r", "new-1.failures < 1"),))])


def test_promotion_by_itself_needs_to_know_whom() -> None:
    check_rules([experiment(ERRORS, promote_when="pass")])
    both = PromotionRule("both", "control.failures == candidate.failures")
    with pytest.raises(RequestInvalid, match="promote_when needs one arm"):
        check_rules([Experiment("ab", ARMS, promote=(both,), promote_when="pass")])
    with pytest.raises(ValueError, match="needs rules"):
        experiment(promote_when="pass")


def test_means_are_over_answered_requests_and_nothing_is_made_of_nothing() -> None:
    counts = {"requests": 17.0, "failures": 2.0, "cancelled": 5.0}
    counts |= {"first_token_seconds": 5.0, "answer_seconds": 20.0}
    assert arm_statistics(counts) == {
        "failure_fraction": 2 / 17,
        "mean_first_token_s": 0.5,
        "mean_answer_s": 2.0,
    }
    assert set(arm_statistics({}).values()) == {None}
    assert set(shadow_statistics({"offered": 5.0}).values()) == {None}
    told = {"compared": 4.0, "exact": 3.0, "scored_tokens": 8.0, "agreed_tokens": 6.0}
    told |= {"incumbent_nll": 10.0, "candidate_nll": 12.0, "answer_tokens": 10.0}
    assert shadow_statistics({**told, "prefix_tokens": 5.0}) == {
        "exact": 0.75,
        "prefix": 0.5,
        "agreement": 0.75,
        "nll_delta": 0.25,
    }
