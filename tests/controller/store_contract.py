"""What every Store must do. A concrete test module gives the fixture `store`, and gets these."""

from __future__ import annotations

from dataclasses import replace

import pytest

from remora_contract.device_phase import Phase
from remora_contract.errors import Conflict, Unauthenticated
from remora_controller.domain import (
    BootTrail,
    Device,
    DeviceEvent,
    Facts,
    Member,
    MetricPoint,
    ReleaseRecord,
    Report,
    RolloutRecord,
    RolloutSpec,
    RolloutState,
    ServingAdapter,
    Sighting,
    StoredEvent,
    SyncRecord,
    Wave,
)
from remora_controller.experiments.tally import ArmRow, Counted
from remora_controller.rollout import AdvanceWave, Assign, SetState
from remora_controller.store.protocol import JoinTokenRecord, Store

SPEC = RolloutSpec(waves=(Wave(count=1), Wave(percent=50.0)), soak_s=3.0, max_unavailable=2)


def device(name: str = "d1", **changes: object) -> Device:
    facts = Facts(hostname=f"host-{name}", memory_bytes=8 << 30, backends={"onnxruntime": "1.32"})
    return replace(Device(name, 10.0, f"key-{name}", facts, {"site": "berlin"}), **changes)


def enrol(store: Store, name: str = "d1", **labels: str) -> Device:
    store.add_join_token(JoinTokenRecord(f"token-{name}", labels, 0.0, 100.0, "op"))
    return store.enrol(f"token-{name}", device(name), 10.0)


def release(store: Store, name: str = "rel", at: float = 1.0) -> ReleaseRecord:
    return store.add_release(ReleaseRecord(f"{name}-{at}", name, b"{}", at, "op"))


def rollout(store: Store, release_id: str, *device_ids: str, **changes: object) -> RolloutRecord:
    record = RolloutRecord("r-1", release_id, "site=berlin", SPEC, 1, 20.0, "op", clock_at=20.0)
    record = replace(record, **changes)
    store.add_rollout(record, [Member(d, 1) for d in device_ids], supersede=False)
    return record


def sync(name: str, *, generation: int = 0, phase: str = "", **changes: object) -> SyncRecord:
    base = SyncRecord(
        name,
        Facts(hostname="new"),
        {"site": "paris"},
        Report(phase=phase, generation=generation),
        BootTrail("boot", 1),
        30.0,
    )
    return replace(base, **changes)


class StoreContract:
    # -- enrolment -------------------------------------------------------------------------

    def test_a_token_lets_one_device_in_with_its_labels(self, store):
        made = enrol(store, "d1", tier="prod")
        assert made.labels == {"site": "berlin", "tier": "prod"}
        assert store.device("d1") == made
        with pytest.raises(Unauthenticated, match="used before"):
            store.enrol("token-d1", device("d2"), 11.0)
        assert store.device("d2") is None

    def test_the_same_key_may_ask_again_and_stays_the_same_device(self, store):
        first = enrol(store)
        again = store.enrol("token-d1", device("other-id", key_fingerprint="key-d1"), 500.0)
        assert again == first
        assert len(store.devices()) == 1

    def test_a_removed_device_cannot_use_its_old_token_again(self, store):
        enrol(store)
        store.remove_device("d1", 20.0)
        with pytest.raises(Unauthenticated):
            store.enrol("token-d1", device("d2", key_fingerprint="key-d1"), 21.0)

    @pytest.mark.parametrize(("secret", "at"), [("unknown", 5.0), ("token", 100.0)])
    def test_an_unknown_or_expired_token_lets_nobody_in(self, store, secret, at):
        store.add_join_token(JoinTokenRecord("token", {}, 0.0, 100.0, "op"))
        with pytest.raises(Unauthenticated, match="remora devices token"):
            store.enrol(secret, device(), at)
        assert store.devices() == []

    # -- devices ---------------------------------------------------------------------------

    def test_a_removed_device_is_known_and_not_listed(self, store):
        enrol(store)
        store.remove_device("d1", 20.0)
        assert store.devices() == []
        assert store.device("d1").removed_at == 20.0

    def test_standings_tell_the_quarantined_and_leave_out_the_removed(self, store):
        for name in ("well", "held", "gone"):
            enrol(store, name)
        store.quarantine("held", "two machines", 20.0)
        store.remove_device("gone", 20.0)
        assert sorted(store.standings()) == [("held", "quarantined"), ("well", None)]

    def test_the_first_reason_of_a_quarantine_stays(self, store):
        enrol(store)
        store.quarantine("d1", "first", 20.0)
        store.quarantine("d1", "second", 21.0)
        assert store.device("d1").quarantine == "first"
        assert [e.name for e in store.events("d1", 10)] == ["device.quarantined"]

    def test_operator_labels_win_over_the_device_and_survive_its_reports(self, store):
        enrol(store)
        store.set_operator_labels("d1", {"site": "oslo"})
        store.record_syncs([sync("d1")])
        assert store.device("d1").labels == {"site": "oslo"}
        assert store.device("d1").device_labels == {"site": "paris"}

    def test_a_sync_replaces_what_the_device_said_before(self, store):
        enrol(store)
        report = Report(
            "SOAKING", 3, "r", "r", "sha256:0", (ServingAdapter("a", "1", "d", 4),), "E", "m", 0.5
        )
        record = sync("d1", report=report, trail=BootTrail("b", 2, ("a",)))
        store.record_syncs([sync("d1"), record])
        known = store.device("d1")
        assert (known.report, known.trail) == (report, BootTrail("b", 2, ("a",)))
        assert (known.facts.hostname, known.last_seen) == ("new", 30.0)

    def test_events_are_stored_once_however_often_they_are_sent(self, store):
        enrol(store)
        events = tuple(DeviceEvent(n, float(n), f"e{n}", "{}") for n in (5, 6, 7))
        store.record_syncs([sync("d1", events=events[:2])])
        store.record_syncs([sync("d1", events=events)])
        assert [e.name for e in store.events("d1", 10)] == ["e7", "e6", "e5"]
        assert store.device("d1").events_up_to == 7

    def test_a_sync_of_an_unknown_device_changes_nothing(self, store):
        store.record_syncs([sync("stranger")])
        assert store.device("stranger") is None

    def test_sightings_move_only_when_and_by_whom(self, store):
        enrol(store)
        before = store.device("d1")
        store.record_sightings([Sighting("d1", BootTrail("b", 9), 77.0)])
        assert store.device("d1") == replace(before, last_seen=77.0, trail=BootTrail("b", 9))

    # -- releases --------------------------------------------------------------------------

    def test_a_release_is_found_by_id_and_by_name_newest_first(self, store):
        old, new = release(store, at=1.0), release(store, at=2.0)
        assert store.release(old.release_id) == old
        assert store.release("rel") == new
        assert store.releases() == [new, old]
        assert store.release("nothing") is None

    def test_creating_a_release_again_gives_the_first(self, store):
        first = release(store)
        again = replace(first, created_at=99.0, created_by="other")
        assert store.add_release(again) == first
        assert store.releases() == [first]

    # -- rollouts --------------------------------------------------------------------------

    def test_a_rollout_comes_back_as_it_was_stored(self, store):
        enrol(store)
        made = rollout(store, release(store).release_id, "d1")
        assert store.rollout("r-1") == made
        assert store.rollouts() == store.open_rollouts() == [made]
        assert store.rollout("r-2") is None

    def test_two_open_rollouts_never_share_a_device(self, store):
        for name in ("d1", "d2", "d3"):
            enrol(store, name)
        release_id = release(store).release_id
        rollout(store, release_id, "d1", "d2")
        with pytest.raises(Conflict, match=r"r-1 is still open on d2.*--supersede"):
            rollout(store, release_id, "d2", "d3", rollout_id="r-2")
        assert store.rollout("r-2") is None
        rollout(store, release_id, "d3", rollout_id="r-3")

    def test_superseding_ends_the_other_rollout_with_the_start(self, store):
        enrol(store)
        first = rollout(store, release(store).release_id, "d1")
        second = replace(first, rollout_id="r-2", created_at=50.0)
        assert store.add_rollout(second, [Member("d1", 1)], supersede=True) == ["r-1"]
        ended = store.rollout("r-1")
        assert (ended.state, ended.reason) == (RolloutState.SUPERSEDED, "superseded by r-2")
        assert [r.rollout_id for r in store.open_rollouts()] == ["r-2"]

    def test_generations_count_each_device_by_itself(self, store):
        enrol(store, "d1")
        enrol(store, "d2")
        made = rollout(store, release(store).release_id, "d1", "d2")
        actions = [Assign("d1", made.release_id, False), Assign("d2", made.release_id, False)]
        assert [a.generation for a in store.apply(made, actions, 21.0)] == [1, 1]
        made = store.rollout("r-1")
        (back,) = store.apply(made, [Assign("d1", None, True)], 22.0)
        assert (back.generation, back.release_id, back.is_rollback) == (2, None, True)
        assert store.assignment("d1") == back
        assert {d: a.generation for d, a in store.assignments().items()} == {"d1": 2, "d2": 1}
        assert back.soak_s == SPEC.soak_s

    def test_a_generation_the_device_already_knows_is_never_given_again(self, store):
        """As after restoring a backup of the store."""
        enrol(store)
        store.record_syncs([sync("d1", generation=7, phase="COMMITTED")])
        made = rollout(store, release(store).release_id, "d1")
        (assigned,) = store.apply(made, [Assign("d1", made.release_id, False)], 21.0)
        assert assigned.generation == 8

    def test_a_decision_about_an_older_state_is_not_carried_out(self, store):
        enrol(store)
        made = rollout(store, release(store).release_id, "d1")
        assert store.set_state(made, RolloutState.PAUSED, "by op", False, 21.0)
        assert store.apply(made, [Assign("d1", made.release_id, False)], 22.0) is None
        assert not store.set_state(made, RolloutState.ABORTING, "late", False, 22.0)
        assert store.assignment("d1") is None
        assert store.rollout("r-1").state is RolloutState.PAUSED

    def test_a_decision_with_a_failing_part_leaves_nothing_behind(self, store):
        enrol(store)
        made = rollout(store, release(store).release_id, "d1")
        actions = [Assign("d1", made.release_id, False), Assign("nobody", made.release_id, False)]
        with pytest.raises(Exception, match=r"(?i)foreign key"):
            store.apply(made, actions, 21.0)
        assert store.assignment("d1") is None
        assert store.rollout("r-1").version == 0

    def test_waves_and_states_are_recorded_with_their_time(self, store):
        enrol(store)
        made = rollout(store, release(store).release_id, "d1")
        store.apply(made, [AdvanceWave(2)], 40.0)
        moved = store.rollout("r-1")
        assert (moved.wave, moved.clock_at, moved.version) == (2, 40.0, 1)
        store.apply(moved, [SetState(RolloutState.COMPLETED, "1 succeeded")], 50.0)
        (done,) = store.completed_rollouts()
        assert (done.state, done.finished_at) == (RolloutState.COMPLETED, 50.0)
        assert store.open_rollouts() == []

    def test_member_states_tell_what_a_decision_needs(self, store):
        enrol(store, "d1", tier="prod")
        good = release(store, "good")
        first = rollout(store, good.release_id, "d1")
        store.apply(first, [Assign("d1", good.release_id, False)], 21.0)
        store.record_syncs([sync("d1", generation=1, phase="COMMITTED")])
        store.apply(store.rollout("r-1"), [SetState(RolloutState.COMPLETED, "")], 22.0)
        second = rollout(store, release(store, "bad").release_id, "d1", rollout_id="r-2")
        (untouched,) = store.member_states("r-2")
        assert untouched.forward is None
        assert untouched.labels == {"site": "paris", "tier": "prod"}
        store.apply(second, [Assign("d1", second.release_id, False)], 23.0)
        store.record_syncs([sync("d1", generation=2, phase="REVERTED")])
        (state,) = store.member_states("r-2")
        assert (state.forward.generation, state.forward.phase) == (2, Phase.REVERTED)
        assert state.last_good == good.release_id
        assert not state.is_barred

    def test_a_release_that_crash_looped_after_its_commit_is_not_a_last_good_one(self, store):
        enrol(store)
        first = rollout(store, release(store, "shaky").release_id, "d1")
        store.apply(first, [Assign("d1", first.release_id, False)], 21.0)
        for phase in ("COMMITTED", "REVERTING", "REVERTED"):
            store.record_syncs([sync("d1", generation=1, phase=phase)])
        store.apply(store.rollout("r-1"), [SetState(RolloutState.COMPLETED, "")], 22.0)
        second = rollout(store, release(store, "next").release_id, "d1", rollout_id="r-2")
        store.apply(second, [Assign("d1", second.release_id, False)], 23.0)
        (state,) = store.member_states("r-2")
        assert state.last_good is None

    def test_phases_of_a_generation_only_move_forward(self, store):
        enrol(store)
        made = rollout(store, release(store).release_id, "d1")
        store.apply(made, [Assign("d1", made.release_id, False)], 21.0)
        for phase in ("SOAKING", "STAGING", "COMMITTED", "SOAKING", "unheard-of"):
            store.record_syncs([sync("d1", generation=1, phase=phase)])
        assert store.assignment("d1").phase is Phase.COMMITTED

    def test_barred_devices_are_marked(self, store):
        enrol(store, "d1")
        enrol(store, "d2")
        rollout(store, release(store).release_id, "d1", "d2")
        store.quarantine("d1", "clone", 21.0)
        store.remove_device("d2", 21.0)
        assert [s.is_barred for s in store.member_states("r-1")] == [True, True]

    def test_a_late_device_becomes_a_member_of_the_completed_rollout(self, store):
        enrol(store, "d1")
        enrol(store, "late")
        made = rollout(store, release(store).release_id, "d1")
        assigned = store.assign_late("late", made, 60.0)
        assert (assigned.generation, assigned.rollout_id) == (1, "r-1")
        members = {s.member.device_id: s.member for s in store.member_states("r-1")}
        assert members["late"].generation == 1

    # -- journal ---------------------------------------------------------------------------

    def test_events_come_newest_first_by_device_and_name(self, store):
        store.add_events([StoredEvent(float(n), f"d{n % 2}", f"n{n % 3}", "{}") for n in range(6)])
        assert [e.at for e in store.events(None, 3)] == [5.0, 4.0, 3.0]
        assert [e.at for e in store.events("d1", 10)] == [5.0, 3.0, 1.0]
        assert [e.at for e in store.events(None, 10, "n0")] == [3.0, 0.0]

    def test_the_newest_metric_is_the_latest_by_time_not_by_arrival(self, store):
        points = [MetricPoint("d1", "t", value, at) for value, at in ((1, 5.0), (2, 9.0), (3, 7.0))]
        store.add_metrics(points)
        assert store.latest_metrics()["d1"]["t"].value == 2
        assert [p.value for p in store.metric_history("d1", "t")] == [1, 3, 2]

    def test_pruning_keeps_what_is_recent_and_what_a_way_back_needs(self, store):
        enrol(store)
        good = release(store, "good")
        made = rollout(store, good.release_id, "d1")
        store.apply(made, [Assign("d1", good.release_id, False)], 21.0)
        store.record_syncs([sync("d1", generation=1, phase="COMMITTED")])
        for _ in range(100):
            store.apply(store.rollout("r-1"), [Assign("d1", None, True)], 22.0)
        now = 1e6
        store.add_metrics([MetricPoint("d1", "t", 1, 5.0), MetricPoint("d1", "t", 2, now)])
        store.prune(now)
        assert [p.value for p in store.metric_history("d1", "t")] == [2]
        assert store.assignment("d1").generation == 101
        store.apply(store.rollout("r-1"), [SetState(RolloutState.COMPLETED, "")], 23.0)
        new = rollout(store, release(store, "n").release_id, "d1", rollout_id="r-2")
        store.apply(new, [Assign("d1", new.release_id, False)], 24.0)
        assert store.member_states("r-2")[0].last_good == good.release_id

    # -- experiments -----------------------------------------------------------------------

    def test_what_arms_counted_is_kept_in_place_of_what_was_and_goes_with_the_device(self, store):
        enrol(store, "d1")
        enrol(store, "d2")
        rows = [
            ArmRow(d, "x/a/1", 5.0, {"experiment_requests": Counted(3, 1)}) for d in ("d1", "d2")
        ]
        store.save_arm_counts(rows)
        newer = ArmRow("d1", "x/a/1", 6.0, {"experiment_requests": Counted(4, 1)})
        other = ArmRow("d1", "x/b/2", 6.0, {"shadow_exact": Counted(0.5)})
        store.save_arm_counts([newer, other])
        assert store.arm_counts() == [newer, other, rows[1]]
        store.save_arm_counts([], [("d1", "x/b/2")])
        store.remove_device("d2", 7.0)
        store.save_arm_counts([rows[1]])
        assert store.arm_counts() == [newer], "a removed device's counts do not come back"
