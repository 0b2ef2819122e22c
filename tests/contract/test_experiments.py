"""Which arm answers a session: the same everywhere, by its share, and moved by nothing else."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remora_contract.digests import canonical_json, digest_bytes
from remora_contract.errors import DocumentInvalid
from remora_contract.experiments import (
    Arm,
    Experiment,
    PromotionRule,
    Shadow,
    arm_identity,
    assign,
    check_experiments,
    is_compared,
    written_experiments,
)
from remora_contract.release import (
    Release,
    ReleaseAdapter,
    ReleaseUseCase,
    WeightedName,
    arm_identities,
)
from remora_contract.strict import loads, plain

_DIGEST = {name: digest_bytes(name.encode()) for name in ("bundle", "sql", "sql-2", "poems")}
_ARMS = (Arm("control", 90, adapter="sql"), Arm("candidate", 10, adapter="sql-2"))


def experiment(*percents: float, salt: str = "s", name: str = "sql") -> Experiment:
    arms = tuple(Arm(f"arm{i}", p, adapter="sql") for i, p in enumerate(percents))
    return Experiment(name, arms, salt)


def release(*experiments: Experiment, **more: object) -> Release:
    adapters = tuple(ReleaseAdapter(n, "1", _DIGEST[n]) for n in ("sql", "sql-2", "poems"))
    use_cases = (ReleaseUseCase("both", (WeightedName("sql", 0.5), WeightedName("poems", 0.5))),)
    return Release(
        1,
        "assistant",
        _DIGEST["bundle"],
        adapters,
        use_cases,
        experiments=experiments or None,
        **more,  # type: ignore[arg-type]
    )


@st.composite
def shares(draw: st.DrawFn) -> tuple[float, ...]:
    """Percents of two to five arms, adding up to 100."""
    parts = draw(st.lists(st.integers(0, 1000), min_size=2, max_size=5).filter(sum))
    return tuple(float(Fraction(100 * part, sum(parts))) for part in parts)


@given(shares(), st.text(max_size=40), st.text(st.characters(categories=["L", "N"]), max_size=20))
def test_a_session_gets_the_same_arm_whenever_it_is_asked(
    percents: tuple[float, ...], session: str, salt: str
) -> None:
    first = assign(experiment(*percents, salt=salt), session)
    again = assign(experiment(*percents, salt=salt), session)
    assert first == again
    assert first.percent > 0


@pytest.mark.parametrize(
    ("session", "arm"),
    [("alice", "arm1"), ("bob", "arm0"), ("carol", "arm2"), ("", "arm0"), ("\ud800", "arm0")],
)
def test_arms_of_sessions_are_the_same_in_every_version_of_the_agent(
    session: str, arm: str
) -> None:
    """Written down once: a change of the hash would move every session of every fleet."""
    assert assign(experiment(50, 30, 20), session).name == arm


@given(shares(), st.integers(0, 1 << 32))
@settings(max_examples=15, deadline=None)
def test_arms_get_their_shares_within_what_chance_allows(
    percents: tuple[float, ...], seed: int
) -> None:
    count = 1500
    wanted = experiment(*percents, salt=str(seed))
    found = Counter(assign(wanted, f"session-{i}").name for i in range(count))
    for arm in wanted.arms:
        p = arm.percent / 100
        # Six standard deviations: once in half a billion draws.
        assert abs(found[arm.name] - count * p) <= 6 * math.sqrt(count * p * (1 - p)) + 1e-9


@given(shares(), st.integers(0, 4), st.floats(0.01, 0.99), st.integers(0, 1 << 32))
@settings(max_examples=40, deadline=None)
def test_raising_an_arm_moves_sessions_into_that_arm_alone(
    percents: tuple[float, ...], which: int, growth: float, seed: int
) -> None:
    """The others give it up in proportion, as they must where there are two arms."""
    raised = which % len(percents)
    share = Fraction(percents[raised]) / 100
    more = share + (1 - share) * Fraction(growth)
    scale = (1 - more) / (1 - share) if share < 1 else Fraction(0)
    after = [float(Fraction(p) * scale) for p in percents]
    after[raised] = float(100 * more)
    before, now = (experiment(*p, salt=str(seed)) for p in (percents, after))
    for i in range(120):
        old, new = assign(before, f"s{i}").name, assign(now, f"s{i}").name
        assert new in (old, f"arm{raised}")


def shadowed(percent: float, salt: str = "s") -> Experiment:
    return Experiment("sql", _ARMS, salt, Shadow("control", "candidate", percent))


def test_a_shadow_compares_its_share_of_requests_and_a_larger_share_keeps_them() -> None:
    ids = [f"request-{i}" for i in range(3000)]
    few, many = ({i for i in ids if is_compared(shadowed(p), i)} for p in (10, 25))
    assert few < many
    for found, p in ((few, 0.10), (many, 0.25)):
        assert abs(len(found) - 3000 * p) <= 6 * math.sqrt(3000 * p * (1 - p))
    assert all(is_compared(shadowed(100), i) for i in ids)
    assert not any(is_compared(experiment(50, 50), i) for i in ids[:50])
    other = {i for i in ids if is_compared(shadowed(25, "t"), i)}
    assert len(many & other) < 0.5 * len(many)


@pytest.mark.parametrize(
    ("request_id", "chosen"), [("r0", True), ("r1", True), ("r2", False), ("\ud800", True)]
)
def test_requests_that_are_compared_are_the_same_in_every_version(
    request_id: str, chosen: bool
) -> None:
    assert is_compared(shadowed(40), request_id) is chosen


def test_another_salt_and_another_name_draw_anew() -> None:
    sessions = [f"s{i}" for i in range(400)]
    drawn = [
        [assign(experiment(50, 50, salt=salt, name=name), s).name for s in sessions]
        for salt, name in (("a", "x"), ("b", "x"), ("a", "y"))
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        same = sum(a == b for a, b in zip(drawn[one], drawn[other], strict=True))
        assert 130 < same < 270


def test_an_arm_without_a_share_answers_nobody() -> None:
    shadowed = experiment(100, 0)
    assert {assign(shadowed, f"s{i}").name for i in range(200)} == {"arm0"}


def test_other_bytes_weights_or_salt_are_another_arm_and_another_share_is_not() -> None:
    arm = Arm("candidate", 10, adapter="sql-2")
    mix = [(_DIGEST["sql-2"], 1.0)]
    bundle = _DIGEST["bundle"]
    known = arm_identity(Experiment("sql", _ARMS), arm, bundle, mix)
    more = Experiment("sql", (Arm("control", 50, adapter="sql"), Arm("candidate", 50, adapter="x")))
    assert arm_identity(more, arm, bundle, mix) == known
    others = {
        arm_identity(Experiment("sql", _ARMS), arm, bundle, [(_DIGEST["sql"], 1.0)]),
        arm_identity(Experiment("sql", _ARMS), arm, bundle, [(_DIGEST["sql-2"], 0.5)]),
        arm_identity(Experiment("sql", _ARMS, "salt"), arm, bundle, mix),
        arm_identity(Experiment("sql", _ARMS), _ARMS[0], bundle, mix),
        arm_identity(Experiment("sql", _ARMS), arm, _DIGEST["poems"], mix),
    }
    assert known not in others
    assert len(others) == 5


def test_the_shadow_of_other_bytes_is_counted_anew() -> None:
    """How two agree is of two: another incumbent is another comparison."""
    shadowed = Experiment("sql", _ARMS, shadow=Shadow("control", "candidate", 25))
    known = arm_identities(shadowed, _DIGEST["bundle"], _DIGEST, ())
    other = arm_identities(shadowed, _DIGEST["bundle"], {**_DIGEST, "sql": _DIGEST["poems"]}, ())
    assert known["candidate"] != other["candidate"]
    plain_ = Experiment("sql", _ARMS)
    alone = arm_identities(plain_, _DIGEST["bundle"], _DIGEST, ())
    changed = arm_identities(plain_, _DIGEST["bundle"], {**_DIGEST, "sql": _DIGEST["poems"]}, ())
    assert alone["candidate"] == changed["candidate"] != known["candidate"]
    assert alone["control"] == known["control"]


def test_a_release_with_experiments_reads_back_and_one_without_is_as_it_was() -> None:
    declared = Experiment(
        "sql",
        _ARMS,
        "spring",
        Shadow("control", "candidate", 25),
        (PromotionRule("errors", "candidate.failures / candidate.requests < 0.01"),),
        500,
    )
    made = release(declared)
    assert loads(Release, canonical_json(made), "x") == made
    assert "experiments" not in plain(release())


_BAD = [
    ({"percent": 20.0}, "add up to 110"),
    ({"name": "shadow"}, "not shadow"),
    ({"name": "a/b"}, "letters, digits"),
    ({"percent": float("nan")}, "finite number"),
    ({"percent": -1.0}, "0 to 100"),
    ({"use_case": "both"}, "either an adapter or a use_case"),
    ({"adapter": None}, "either an adapter or a use_case"),
    ({"weight": 1}, "unknown key"),
    ({"name": "control"}, "its own name"),
]


@pytest.mark.parametrize(("change", "why"), _BAD)
def test_arms_that_no_device_could_serve_are_refused(change: dict[str, object], why: str) -> None:
    arms = [{"name": "control", "adapter": "sql", "percent": 90}]
    arms.append({"name": "candidate", "adapter": "sql-2", "percent": 10, **change})
    with pytest.raises(DocumentInvalid, match=why):
        written_experiments([{"name": "sql", "arms": arms}], "experiments")


@pytest.mark.parametrize(
    ("shadow", "why"),
    [
        (Shadow("control", "candidate", 5), None),
        (Shadow("control", "other", 5), "no arm 'other'"),
    ],
)
def test_a_shadow_is_between_arms_of_the_experiment(shadow: Shadow, why: str | None) -> None:
    if why is None:
        assert Experiment("sql", _ARMS, shadow=shadow).shadow == shadow
        return
    with pytest.raises(ValueError, match=why):
        Experiment("sql", _ARMS, shadow=shadow)


def test_arms_name_what_the_release_has() -> None:
    use_case = (Arm("one", 50, use_case="both"), Arm("two", 50, adapter="sql"))
    assert release(Experiment("support", use_case)).experiments
    with pytest.raises(ValueError, match="no adapter 'sql-9'"):
        release(Experiment("x", (Arm("a", 50, adapter="sql-9"), Arm("b", 50, adapter="sql"))))
    with pytest.raises(ValueError, match="no use case 'none'"):
        release(Experiment("x", (Arm("a", 50, use_case="none"), Arm("b", 50, adapter="sql"))))
    with pytest.raises(ValueError, match="so its arms are adapters"):
        release(Experiment("sql", use_case))
    with pytest.raises(ValueError, match="listed twice"):
        release(Experiment("x", _ARMS), Experiment("x", _ARMS))


def test_experiments_are_bounded() -> None:
    many = [Experiment(f"e{i}", _ARMS) for i in range(5)]
    with pytest.raises(ValueError, match="1 to 4 experiments"):
        check_experiments(many, ["sql", "sql-2"], [])
    arms = tuple(Arm(f"a{i}", 20, adapter="sql") for i in range(5))
    with pytest.raises(ValueError, match="at most 8 arms"):
        check_experiments([Experiment("x", arms), Experiment("y", arms)], ["sql"], [])
    with pytest.raises(ValueError, match="leave experiments out"):
        check_experiments([], ["sql"], [])


def test_people_write_tables_of_names() -> None:
    written = {
        "sql": {
            "salt": "spring",
            "arms": {
                "control": {"adapter": "sql", "percent": 90},
                "candidate": {"adapter": "sql-2", "percent": 10},
            },
            "shadow": {"incumbent": "control", "candidate": "candidate", "percent": 25},
            "promote": {"errors": "candidate.failures == 0"},
        }
    }
    rules = (PromotionRule("errors", "candidate.failures == 0"),)
    shadow = Shadow("control", "candidate", 25)
    wanted = Experiment("sql", _ARMS, "spring", shadow, rules)
    assert written_experiments(written, "x") == (wanted,)
    assert written_experiments(plain((wanted,)), "x") == (wanted,)
    written["sql"]["arms"]["control"]["name"] = "other"  # type: ignore[index]
    with pytest.raises(DocumentInvalid, match="its key is the name"):
        written_experiments(written, "x")
