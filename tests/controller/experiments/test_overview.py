"""Experiments of releases as operators see them."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from remora_contract.digests import digest_bytes
from remora_contract.experiments import (
    ARM_PREFIX,
    SHADOW_PREFIX,
    Arm,
    Experiment,
    PromotionRule,
    Shadow,
)
from remora_contract.release import Release, ReleaseAdapter
from remora_controller.experiments.overview import labels_of, overview
from remora_controller.experiments.tally import Sum
from remora_controller.operator_cli.experiments_view import as_data, experiment_view, listed
from remora_controller.services.experiments import experiment_message

ARMS = (Arm("control", 90, adapter="sql"), Arm("candidate", 10, adapter="sql-2"))
ADAPTERS = tuple(ReleaseAdapter(n, "1", digest_bytes(n.encode())) for n in ("sql", "sql-2"))
ALIKE = PromotionRule("alike", "shadow.exact / shadow.compared >= 0.98")
SHADOWED = Experiment("sql", ARMS, "s", Shadow("control", "candidate", 25), (ALIKE,))


def release(name: str, *experiments: Experiment) -> Release:
    return Release(1, name, digest_bytes(b"bundle"), ADAPTERS, experiments=experiments)


def arm(**counts: float) -> dict[str, float]:
    return {ARM_PREFIX + name: value for name, value in counts.items()}


def shadow(**counts: float) -> dict[str, float]:
    return {SHADOW_PREFIX + name: value for name, value in counts.items()}


def shown(view) -> str:
    console = Console(width=240)
    with console.capture() as text:
        console.print(view)
    return text.get()


def test_a_shadow_is_shown_with_what_it_comes_to() -> None:
    made = release("r", SHADOWED)
    labels = labels_of(made)["sql"]
    told = shadow(
        offered=2500, skipped=600, compared=1800, exact=1700, scored_tokens=100,
        agreed_tokens=75, incumbent_nll=50, candidate_nll=60, answer_tokens=10, prefix_tokens=9,
    )  # fmt: skip
    sums = {
        labels["control"]: Sum(3, arm(requests=10, answer_seconds=20)),
        labels["candidate"]: Sum(2, {**arm(requests=4), **told}),
    }
    (view,) = overview([made], {made.release_id: 3}, sums)
    message = experiment_message(view)
    data = as_data(message)
    control, candidate = data["arms"]
    assert (control["shadow"], control["shadow_statistics"]) == ({}, None)
    assert candidate["shadow"]["offered"] == 2500
    assert candidate["shadow_statistics"] == {
        "exact": 1700 / 1800,
        "prefix": 0.9,
        "agreement": 0.75,
        "nll_delta": 0.1,
    }
    assert control["statistics"]["mean_answer_s"] == 2.0
    assert (data["candidate"], data["verdict"], data["devices"]) == ("candidate", "FAIL", 3)
    text = shown(experiment_view(message))
    for part in ("control by candidate", "94.44%", "75.00%", "+0.1000", "alike", "FAIL"):
        assert part in text
    assert "shadow.compared = 1800" in text


def test_releases_that_declare_the_same_arms_are_one_and_the_newest_says_the_shares() -> None:
    shares = replace(
        SHADOWED, shadow=None, promote=(), arms=tuple(replace(a, percent=50) for a in ARMS)
    )
    older = replace(shares, arms=ARMS)
    other = replace(older, salt="another")
    releases = [release("c", shares), release("b", other), release("a", older)]
    ids = [r.release_id for r in releases]
    first, second = overview(releases, {ids[0]: 2, ids[2]: 1, ids[1]: 4}, {})
    assert (first.release_ids, first.running) == ((ids[0], ids[2]), 3)
    assert [v.arm.percent for v in first.arms] == [50, 50]
    assert (second.release_ids, second.running) == ((ids[1],), 4)
    assert {v.identity for v in first.arms}.isdisjoint(v.identity for v in second.arms)
    text = shown(listed(map(experiment_message, (first, second))))
    assert text.count("control") == 2
    assert "no rule names candidate" in shown(experiment_view(experiment_message(first)))
