"""The controller promotes by itself: once, on evidence, and never against an operator."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from remora_contract.digests import canonical_json
from remora_contract.errors import Exhausted
from remora_contract.experiments import Arm, Experiment, PromotionRule
from remora_contract.gates import Gate
from remora_contract.release import Release, ReleaseAdapter
from remora_contract.strict import loads
from remora_controller.domain import (
    Device,
    Facts,
    MetricPoint,
    ReleaseRecord,
    RolloutRecord,
    RolloutState,
)
from remora_controller.experiments.automatic import HELD_S, AutoPromotion, newest_completed
from remora_controller.experiments.laboratory import Laboratory
from remora_controller.experiments.overview import labels_of
from remora_controller.operations import StartRequest
from remora_controller.store.protocol import JoinTokenRecord
from tests.controller import artifacts
from tests.controller.test_scale import Simulation, spec

RULE = PromotionRule("errors", "candidate.failures / candidate.requests < 0.01")
ARMS_GATE = Gate("arms", "increase(experiment_failures_total) < 5", on_fail="pause")


class Fleet(Simulation):
    """A completed rollout of an experiment that promotes itself."""

    def __init__(self, tmp_path, gates=(), **changes: object) -> None:
        super().__init__(tmp_path, 4)
        repository = tmp_path / "repository"
        self.bundle = artifacts.bundle(repository)
        self.old, self.new = (artifacts.adapter(repository, "sql", r) for r in ("1", "2"))
        lab = Laboratory(self.store, self.operations, self.presence, lambda: self.now)
        self.auto = AutoPromotion(self.store, self.operations, lab, lambda: self.now)
        self.declared = self.release_with("pass")
        wanted = spec(gates=tuple(gates))
        start = StartRequest(self.declared.release_id, "", wanted, **changes)
        self.first = self.operations.start(start, "op").record.rollout_id

    def release_with(self, promote_when: str | None, share: float = 10.0) -> Release:
        arms = (
            Arm("control", 100 - share, adapter="sql"),
            Arm("candidate", share, adapter="sql-2"),
        )
        experiment = Experiment("sql", arms, "s", promote=(RULE,), promote_when=promote_when)
        adapters = (
            ReleaseAdapter("sql", "1", self.old.digest),
            ReleaseAdapter("sql-2", "2", self.new.digest),
        )
        made = Release(1, "ab", self.bundle.digest, adapters, experiments=(experiment,))
        self.operations.create_release(canonical_json(made), "op")
        return made

    def tell(self, requests: float, failures: float = 0.0, device: int = 0) -> None:
        label = labels_of(self.declared)["sql"]["candidate"]
        for name, value in (("requests", requests), ("failures", failures)):
            metric = f"experiment_{name}_total.{label}"
            point = MetricPoint(self.ids[device], metric, value, self.now)
            self.presence.add_metrics(self.ids[device], [point])

    def rollouts(self) -> list[RolloutRecord]:
        return self.store.rollouts()

    def events(self, name: str) -> list[dict[str, object]]:
        return [json.loads(e.detail_json) for e in self.store.events(None, 100, name)]


@pytest.fixture
def world(tmp_path):
    made = Fleet(tmp_path)
    yield made
    made.store.close()


def test_it_waits_for_the_rollout_and_the_rules_and_then_starts_one_rollout(world):
    world.tell(500)
    assert not world.auto.tick(), "the experiment's own rollout has not completed"
    assert world.run(world.first) is RolloutState.COMPLETED
    world.now += 1
    world.tell(501, 6)
    assert not world.auto.tick(), "a rule fails"
    world.now += 1
    world.tell(5000, 6)
    assert world.auto.tick()
    newest, _ = world.rollouts()
    assert (newest.created_by, newest.state) == ("controller", RolloutState.RUNNING)
    assert newest.spec.waves == world.store.rollout(world.first).spec.waves
    release = loads(Release, world.store.release(newest.release_id).document, "x")
    assert release.experiments is None
    assert {a.name: a.digest for a in release.adapters}["sql"] == world.new.digest
    for _ in range(3):
        assert not world.auto.tick()
    assert world.run(newest.rollout_id) is RolloutState.COMPLETED
    assert not world.auto.tick()
    (told,) = world.events("experiment.promoted")
    assert (told["by"], told["forced"]) == ("controller", None)
    entries = world.store.audit(0.0, 0, 100)
    assert [(e.draft.who, e.draft.what, e.draft.result) for e in entries] == [
        ("controller", "PromoteExperiment", ""),
        ("controller", "PromoteExperiment", "OK"),
    ]
    assert entries[1].draft.answers == entries[0].seq


def test_a_promotion_that_went_back_is_not_tried_again(world):
    world.run(world.first)
    world.tell(5000)
    assert world.auto.tick()
    world.broken = set(world.ids)
    newest = world.rollouts()[0]
    assert world.run(newest.rollout_id) is RolloutState.ROLLED_BACK
    assert {a.release_id for a in world.store.assignments().values()} == {world.declared.release_id}
    world.now += 10 * HELD_S
    assert not world.auto.tick()
    assert len(world.rollouts()) == 2


def test_what_an_operator_rolled_out_since_wins(world):
    world.run(world.first)
    world.tell(5000)
    other = world.release_with(None, share=50.0)
    started = world.operations.start(StartRequest(other.release_id, "", spec()), "op")
    assert not world.auto.tick()
    world.run(started.record.rollout_id)
    assert not world.auto.tick(), "this release says nothing of promoting itself"


def test_devices_that_were_given_something_else_hold_it(world, tmp_path):
    world.run(world.first)
    world.tell(5000)
    other = world.release(tmp_path, "other")
    request = StartRequest(other, f"id={world.ids[0]}", spec())
    started = world.operations.start(request, "op").record.rollout_id
    assert world.run(started) is RolloutState.COMPLETED
    assert not world.auto.tick()
    (held,) = world.events("experiment.held")
    assert world.ids[0] in held["reason"] and "promote by hand" in held["reason"]
    world.store.set_pin(world.ids[0], "keeps what it has")
    world.now += HELD_S
    assert world.auto.tick(), "a pinned device is nobody's concern"


def test_a_device_that_missed_the_experiment_holds_nothing_up(world):
    world.run(world.first)
    world.tell(5000)
    token = JoinTokenRecord("late", {}, 0.0, 1e9, "op")
    world.store.add_join_token(token)
    world.store.enrol("late", Device("late", 0.0, "key", Facts(hostname="late")), 0.0)
    assert world.auto.tick()
    assert len(world.operations.rollout(world.rollouts()[0].rollout_id).view.members) == 5


def test_an_approval_that_the_experiment_needed_is_needed_again(tmp_path):
    world = Fleet(tmp_path, needs_approval=True)
    world.store.approve(world.store.rollout(world.first), "other", world.now)
    world.run(world.first)
    world.tell(5000)
    assert world.auto.tick()
    assert world.rollouts()[0].state is RolloutState.AWAITING_APPROVAL
    world.store.close()


def test_gates_of_the_rollout_that_measure_the_arms_do_not_come_along(tmp_path):
    world = Fleet(tmp_path, gates=(ARMS_GATE, Gate("few", "failed_devices < 3")))
    while not world.store.rollout(world.first).state.is_final:
        world.round()
        for device in range(len(world.ids)):
            world.tell(1, device=device)
        assert world.now < 2000.0, world.operations.rollout(world.first).view.verdicts
    world.now += 1
    world.tell(5000)
    assert world.auto.tick()
    assert [g.name for g in world.rollouts()[0].spec.gates] == ["few"]
    world.store.close()


def test_what_stands_in_the_way_is_told_once_and_tried_again_later(world):
    """A device leaves its place by a rollout of another selector that is still open."""
    world.run(world.first)
    world.tell(5000)
    request = StartRequest(world.declared.release_id, f"id={world.ids[0]}", spec())
    open_ = world.operations.start(request, "op").record.rollout_id
    for _ in range(3):
        assert not world.auto.tick()
    (held,) = world.events("experiment.held")
    assert f"rollout {open_} is still open" in held["reason"]
    assert world.run(open_) is RolloutState.COMPLETED
    assert not world.auto.tick(), "not at once"
    world.now += HELD_S
    assert world.auto.tick()


@pytest.mark.parametrize("place", ["asked", "concluded"])
def test_a_full_disk_neither_promotes_unwritten_nor_twice(world, monkeypatch, caplog, place):
    world.run(world.first)
    world.tell(5000)
    real = world.store.append_audit

    def append(draft):
        if (draft.answers is None) == (place == "asked"):
            raise Exhausted("the controller's disk is full")
        return real(draft)

    with monkeypatch.context() as patch:
        patch.setattr(world.store, "append_audit", append)
        started = world.auto.tick()
    assert started == (place == "concluded")
    assert ("audit.result_lost" in caplog.messages) == started
    world.now += HELD_S + 1
    world.tell(5001)
    assert world.auto.tick() != started
    assert len(world.rollouts()) == 2


def test_a_release_that_cannot_be_read_ends_nothing(world):
    world.run(world.first)
    world.store.add_release(ReleaseRecord("odd-1", "odd", b'{"kind": "new"}', world.now, "op"))
    record = replace(world.store.rollout(world.first), rollout_id="r-odd", release_id="odd-1")
    record = replace(record, selector="tier=odd", created_at=world.now)
    world.store.add_rollout(record, [], supersede=False)
    assert not world.auto.tick()
    (held,) = world.events("experiment.held")
    assert "odd-1" in held["reason"]
    world.tell(5000)
    assert world.auto.tick()


_DEEDS = st.lists(
    st.one_of(
        st.tuples(st.just("tell"), st.integers(0, 80), st.integers(0, 2)),
        st.tuples(st.sampled_from(("rounds", "break", "operator", "tick"))),
    ),
    max_size=14,
)


@given(_DEEDS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_happens_it_promotes_on_evidence_alone_and_once_a_rollout(tmp_path_factory, deeds):
    world = Fleet(tmp_path_factory.mktemp("fleet"))
    world.run(world.first)
    requests, failures, brought = 0, 0, 1
    for what, *numbers in deeds:
        world.now += 1
        if what == "tell":
            requests, failures = requests + sum(numbers), failures + numbers[1]
            world.tell(requests, failures)
        elif what == "rounds":
            for _ in range(40):
                world.round()
        elif what == "break":
            world.broken = set(world.ids)
        elif what == "operator":
            start = StartRequest(world.declared.release_id, "", spec(), supersede=True)
            world.operations.start(start, "op")
            brought += 1
        elif world.auto.tick():
            assert requests >= 100 and failures / requests < 0.01
            assert not world.auto.tick()
        own = [r for r in world.rollouts() if r.created_by == "controller"]
        assert len(own) <= brought
    world.store.close()


def test_of_each_selector_only_the_newest_rollout_counts() -> None:
    def record(rollout_id: str, selector: str, state: RolloutState) -> RolloutRecord:
        made = spec(gates=())
        return RolloutRecord(rollout_id, "r", selector, made, 1, 0.0, "op", state=state)

    completed, back = RolloutState.COMPLETED, RolloutState.ROLLED_BACK
    listed = [
        record("a", "x", completed),
        record("b", "y", back),
        record("c", "x", completed),
        record("d", "y", completed),
    ]
    assert [r.rollout_id for r in newest_completed(listed)] == ["a"]
