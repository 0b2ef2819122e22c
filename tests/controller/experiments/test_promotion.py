"""The release that a promotion makes: the name means the winner, and nothing else is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_contract.digests import digest_bytes
from remora_contract.errors import NotFound
from remora_contract.experiments import Arm, Experiment, arm_mix
from remora_contract.gates import Gate, GateSet, GoldenQuestion
from remora_contract.release import Release, ReleaseAdapter, ReleaseUseCase, WeightedName
from remora_controller.experiments.promotion import promoted

SQL, BETTER, POEMS = (digest_bytes(n.encode()) for n in ("sql", "sql-2", "poems"))
ADAPTERS = (
    ReleaseAdapter("sql", "1", SQL),
    ReleaseAdapter("sql-2", "1", BETTER),
    ReleaseAdapter("poems", "7", POEMS),
)
BOTH = ReleaseUseCase("both", (WeightedName("sql", 0.5), WeightedName("poems", 0.5)))
AB = Experiment(
    "sql", (Arm("control", 90, adapter="sql"), Arm("candidate", 10, adapter="sql-2")), "s"
)
MIXED = Experiment("support", (Arm("alone", 50, adapter="poems"), Arm("mix", 50, use_case="both")))


def release(*experiments: Experiment, gates: GateSet | None = None) -> Release:
    return Release(
        1,
        "assistant",
        digest_bytes(b"bundle"),
        ADAPTERS,
        (BOTH,),
        gates=gates,
        experiments=experiments or None,
    )


def bytes_of(made: Release) -> dict[str, tuple[tuple[str, float], ...]]:
    """What each name of the release runs."""
    digests = {a.name: a.digest for a in made.adapters}
    found = {name: ((digest, 1.0),) for name, digest in digests.items()}
    for use_case in made.use_cases:
        mix = tuple((digests[a.name], a.weight) for a in use_case.adapters)
        found[f"use case {use_case.name}"] = mix
    return found


def test_the_name_becomes_the_winners_bytes_and_the_winner_keeps_its_own_name() -> None:
    made = promoted(release(AB), "sql", "candidate")
    assert made.release.experiments is None
    assert bytes_of(made.release)["sql"] == ((BETTER, 1.0),)
    assert bytes_of(made.release)["sql-2"] == ((BETTER, 1.0),)
    assert made.notes == ("use case both has adapter sql: it changes too",)


def test_a_revision_that_devices_know_as_other_bytes_is_not_used_again() -> None:
    """Devices refuse a revision of a name with other bytes, so the rollout would go back."""
    (sql, *_) = promoted(release(AB), "sql", "candidate").release.adapters
    assert sql.name == "sql" and sql.revision != "1" and sql.revision.startswith("1-")


def test_going_back_to_what_the_name_means_takes_the_experiment_away_alone() -> None:
    made = promoted(release(AB), "sql", "control")
    assert made.release == release()
    assert made.notes == ()


def test_a_use_case_wins_under_a_name_of_its_own() -> None:
    made = promoted(release(MIXED), "support", "mix").release
    assert bytes_of(made)["use case support"] == bytes_of(made)["use case both"]
    made = promoted(release(MIXED), "support", "alone").release
    assert bytes_of(made)["use case support"] == ((POEMS, 1.0),)
    named = Experiment("both", (Arm("old", 50, use_case="both"), Arm("new", 50, adapter="sql-2")))
    made = promoted(release(named), "both", "new").release
    assert bytes_of(made)["use case both"] == ((BETTER, 1.0),)
    assert len(made.use_cases) == 1


def test_a_name_that_only_the_experiment_has_becomes_what_its_arms_are() -> None:
    named = Experiment("ab", AB.arms)
    made = promoted(release(named), "ab", "candidate").release
    assert bytes_of(made)["ab"] == ((BETTER, 1.0),)
    assert len(made.use_cases) == 1
    plus = Experiment("a+b", AB.arms)
    made = promoted(release(plus), "a+b", "candidate").release
    assert bytes_of(made)["use case a+b"] == ((BETTER, 1.0),), "no adapter may have such a name"


def test_gates_that_measure_the_arms_go_and_the_others_stay() -> None:
    checks = (
        Gate("arms", "increase(experiment_failures_total) < 5"),
        Gate("mine", f'last("experiment_requests_total.sql/candidate/{"0" * 12}") > 5'),
        Gate("ttft", "p95(ttft_s) < 1"),
    )
    golden = (GoldenQuestion("q", "prefix", "x", expected_text="y", use_case="sql"),)
    gates = GateSet(checks, golden)
    alone = promoted(release(AB, gates=gates), "sql", "candidate")
    assert alone.release.gates == GateSet(checks[2:], golden)
    assert alone.notes[:2] == tuple(
        f"gate {n} goes: it measures arms of the experiment" for n in ("arms", "mine")
    )
    assert "golden question q is asked of what sql becomes" in alone.notes
    both = promoted(release(AB, MIXED, gates=gates), "sql", "candidate")
    assert both.release.gates == GateSet((checks[0], checks[2]), golden)
    assert "experiment support, arm mix: its counts begin anew" in both.notes
    only = promoted(release(AB, gates=GateSet(checks[:1])), "sql", "control")
    assert only.release == release(), "a set without gates is no set"


def test_what_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(NotFound, match="no experiment poems \\(there: sql\\)"):
        promoted(release(AB), "poems", "candidate")
    with pytest.raises(NotFound, match="no arm other \\(there: control, candidate\\)"):
        promoted(release(AB), "sql", "other")


_ARM_CHOICES = st.sampled_from(
    [{"adapter": "sql"}, {"adapter": "sql-2"}, {"adapter": "poems"}, {"use_case": "both"}]
)


@given(
    st.lists(_ARM_CHOICES, min_size=2, max_size=4),
    st.sampled_from(("sql", "poems", "both", "fresh", "a+b")),
    st.integers(0, 3),
)
def test_whatever_the_arms_are_the_name_means_the_winner_and_replays_give_the_same(
    chosen: list[dict[str, str]], name: str, which: int
) -> None:
    if name in ("sql", "poems"):  # an adapter's arms are adapters
        chosen = [c if "adapter" in c else {"adapter": "sql"} for c in chosen]
    share = 100 / len(chosen)
    arms = tuple(Arm(f"arm{i}", share, **c) for i, c in enumerate(chosen))
    before = release(Experiment(name, arms), MIXED)
    winner = arms[which % len(arms)]
    made = promoted(before, name, winner.name)
    assert made == promoted(before, name, winner.name)
    digests = {a.name: a.digest for a in before.adapters}
    wanted = tuple(arm_mix(winner, digests, {"both": [("sql", 0.5), ("poems", 0.5)]}))
    after = bytes_of(made.release)
    assert wanted in (after.get(name), after.get(f"use case {name}"))
    assert {e.name for e in made.release.experiments or ()} == {"support"}
    names = {*bytes_of(before), name, f"use case {name}"}
    assert bytes_of(before).keys() <= after.keys() <= names
    revisions = {(a.name, a.revision): a.digest for a in before.adapters}
    for adapter in made.release.adapters:
        assert revisions.get((adapter.name, adapter.revision), adapter.digest) == adapter.digest
