"""From assignment to serving and back: effects, crashes between intent and effect, garbage."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from remora_agent.control.activation import MAX_CUT_WORK
from remora_agent.control.reconcile import Reconciler
from remora_contract.device_phase import Phase
from remora_contract.errors import EngineFault, Exhausted, Unavailable
from remora_contract.release import Constraints, SamplingDefaults
from tests.agent.control.device import Crash, Device
from tests.support.repository import Repository, make_release


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path / "repository")


@pytest.fixture
def device(tmp_path, repository):
    made = Device(tmp_path / "state", repository.root)
    yield made
    made.database.close()


@pytest.fixture
def first(repository):
    return make_release("first", repository.bundle(1, 120_000), repository.adapter(11))


@pytest.fixture
def second(repository):
    return make_release("second", repository.bundle(2, 120_000), repository.adapter(12))


def failing(error: BaseException):
    def hook(assignment, progress):
        raise error

    return hook


def commit(device: Device, release) -> None:
    device.assign(release)
    assert device.settle().phase is Phase.COMMITTED


def test_a_release_is_staged_built_proven_switched_and_committed(device, first):
    commit(device, first)
    assert [c[0] for c in device.host.calls] == ["build", "prove", "switch"]
    assert device.running == first.release_id
    assert str(device.layout.current.readlink()) == f"releases/{first.release_id}.json"
    names = [n for n, _ in device.events]
    assert names[0] == "release.assigned" and names[-1] == "release.committed"
    assert {"artifact.fetched", "engine.built"} <= set(names)


def test_of_two_graphs_the_device_tells_which_it_built_and_why(device, first, monkeypatch):
    whole = device.host.build

    def build(assignment, progress):
        outcome = whole(assignment, progress)
        return replace(outcome, dialect="legacy", why="has no fused attention")

    monkeypatch.setattr(device.host, "build", build)
    commit(device, first)
    (built,) = (detail for name, detail in device.events if name == "engine.built")
    assert (built["dialect"], built["why"]) == ("legacy", "has no fused attention")


def test_a_new_adapter_ships_nothing_but_the_adapter(device, repository):
    bundle = repository.bundle(1, 200_000)
    commit(device, make_release("one", bundle, repository.adapter(11)))
    before = device.source.sent
    adapter = repository.adapter(12)
    commit(device, make_release("two", bundle, adapter))
    assert device.source.sent - before == adapter.bytes


@pytest.mark.parametrize("step", ["build", "prove"])
def test_a_release_that_cannot_run_fails_while_the_old_one_serves(device, first, second, step):
    commit(device, first)
    device.host.hooks[step] = failing(EngineFault("golden prompt 3, token 17: answered 5"))
    device.assign(second)
    record = device.settle()
    assert (record.phase, record.error_code) == (Phase.FAILED, "EngineFault")
    assert "golden prompt 3" in record.error_message
    assert device.running == first.release_id


def test_a_bug_in_an_effect_fails_the_release_and_not_the_agent(device, first, second):
    commit(device, first)
    device.host.hooks["build"] = failing(ZeroDivisionError("float division"))
    device.assign(second)
    record = device.settle()
    assert (record.phase, record.error_code) == (Phase.FAILED, "InternalFault")
    assert "ZeroDivisionError" in record.error_message
    assert device.running == first.release_id


def test_a_failed_switch_reverts_to_what_served(device, first, second):
    commit(device, first)
    device.host.hooks["switch"] = failing(Exhausted("no memory for two engines"))
    device.assign(second)
    record = device.settle()
    assert (record.phase, record.error_code) == (Phase.REVERTED, "Exhausted")
    assert device.running == first.release_id
    assert str(device.layout.current.readlink()) == f"releases/{first.release_id}.json"


def test_errors_while_soaking_revert_without_the_controller(device, first, second):
    commit(device, first)
    device.assign(second, soak_s=60.0)
    device.settle(until=Phase.SOAKING)
    assert device.running == second.release_id
    device.host.counters.update(requests=10.0, failures=9.0)
    record = device.settle()
    assert (record.phase, record.error_code) == (Phase.REVERTED, "Unhealthy")
    assert "9 of 10 requests failed" in record.error_message
    assert device.running == first.release_id


def test_three_engine_faults_while_soaking_revert(device, first, second):
    commit(device, first)
    device.assign(second, soak_s=60.0)
    device.settle(until=Phase.SOAKING)
    device.host.counters["engine_faults"] = 2.0
    device.reconciler.step()
    assert device.record.phase is Phase.SOAKING
    device.host.counters["engine_faults"] = 3.0
    assert device.settle().phase is Phase.REVERTED
    assert device.running == first.release_id


def test_failures_from_before_the_switch_are_not_held_against_the_new_release(
    device, first, second
):
    device.host.counters.update(requests=100.0, failures=100.0)
    commit(device, first)
    device.assign(second, soak_s=60.0)
    assert device.settle().phase is Phase.COMMITTED


def test_a_first_release_that_is_unwell_fails_because_there_is_no_way_back(device, first):
    device.assign(first, soak_s=60.0)
    device.settle(until=Phase.SOAKING)
    device.host.counters["engine_faults"] = 5.0
    record = device.settle()
    assert (record.phase, record.error_code) == (Phase.FAILED, "Unhealthy")


@pytest.mark.parametrize(
    ("constraints", "code"),
    [
        (Constraints(min_memory_bytes=1 << 60), "memory"),
        (Constraints(min_agent_version="99.0"), "agent_version"),
        (Constraints(backends=("abacus",)), "backend"),
        (Constraints(agent_version="<0.0.1"), "agent_version"),
    ],
)
def test_what_the_device_cannot_run_is_refused_before_a_byte_is_shipped(
    device, first, constraints, code
):
    device.assign(replace(first, constraints=constraints))
    record = device.settle()
    assert (record.phase, record.error_code) == (Phase.REFUSED, code)
    assert device.source.asked == []


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_defaults_that_no_request_could_have_are_refused_before_a_byte_is_shipped(
    device, first, value
):
    device.assign(replace(first, sampling=SamplingDefaults(top_p=value)))
    record = device.settle()
    assert (record.phase, record.error_code) == (Phase.REFUSED, "sampling.top_p")
    assert device.source.asked == []


def test_a_bundle_stored_otherwise_than_the_release_says_never_serves(device, first):
    device.assign(replace(first, quant="nvfp4"))
    record = device.settle()
    assert (record.phase, record.error_code) == (Phase.FAILED, "quant")
    assert device.host.calls == []


def test_a_release_document_that_is_not_what_its_id_says_is_refused(device, first, second):
    from remora_contract.digests import canonical_json

    device.assign(first, text=canonical_json(second))
    record = device.settle()
    assert (record.phase, record.error_code) == (Phase.REFUSED, "DocumentInvalid")


def test_an_adapter_for_another_base_fails_before_the_build(device, repository):
    other = repository.adapter(13, base="sha256:" + "cc" * 32)
    device.assign(make_release("mixed", repository.bundle(1, 10_000), other))
    record = device.settle()
    assert (record.phase, record.error_code) == (Phase.FAILED, "adapter_base of adapter0")
    assert device.host.calls == []


BEFORE_SWITCH = [
    Phase.ASSIGNED,
    Phase.ADMITTED,
    Phase.STAGING,
    Phase.STAGED,
    Phase.BUILDING,
    Phase.BUILT,
    Phase.PROVING,
    Phase.WAIT_WINDOW,
]


@pytest.mark.parametrize("phase", BEFORE_SWITCH)
def test_killed_after_the_intent_and_before_the_switch_resumes(device, first, second, phase):
    commit(device, first)
    device.assign(second)
    device.settle(until=phase)
    device.crash()
    device.boot()
    assert device.running == first.release_id, "the old release serves at once"
    assert device.settle().phase is Phase.COMMITTED
    assert device.running == second.release_id


@pytest.mark.parametrize("phase", BEFORE_SWITCH)
def test_a_first_release_that_is_taken_back_is_dropped_and_leaves_nothing_on_disk(
    device, first, phase
):
    device.assign(first)
    device.settle(until=phase)
    assert device.assign_nothing()
    assert device.settle().phase is Phase.UNASSIGNED
    assert device.running is None
    assert "switch" not in [c[0] for c in device.host.calls]
    left = [p for p in device.layout.root.rglob("*") if p.is_file() and "state.db" not in p.name]
    assert left == []
    device.crash()
    device.boot()
    assert device.settle().phase is Phase.UNASSIGNED
    assert device.running is None


def test_a_download_under_way_is_dropped_when_nothing_is_assigned_any_more(device, first, caplog):
    def taken_back(chunk: str, offset: int) -> None:
        if device.record.phase is Phase.STAGING:
            device.assign_nothing()

    device.source.before = taken_back
    device.assign(first)
    assert device.settle().phase is Phase.UNASSIGNED
    assert "effect.crashed" not in caplog.messages
    assert list(device.layout.artifacts.iterdir()) == []


def test_a_bad_first_release_that_was_committed_serves_on_also_after_a_restart(device, first):
    commit(device, first)
    device.assign_nothing()
    assert device.settle().phase is Phase.UNASSIGNED
    assert device.running == first.release_id
    device.crash()
    device.boot()
    assert device.running == first.release_id


def test_a_first_release_that_soaks_ends_its_soak_before_it_is_taken_back(device, first):
    device.assign(first, soak_s=60.0)
    device.settle(until=Phase.SOAKING)
    assert not device.assign_nothing(), "there is nothing else to serve: the soak decides"
    assert device.settle().phase is Phase.COMMITTED
    assert device.assign_nothing()
    assert device.settle().phase is Phase.UNASSIGNED
    assert device.running == first.release_id


@pytest.mark.parametrize("phase", [Phase.SWITCHING, Phase.SOAKING])
def test_killed_in_the_switch_or_while_soaking_reverts(device, first, second, phase):
    commit(device, first)
    device.assign(second, soak_s=60.0)
    device.settle(until=phase)
    device.crash()
    device.boot()
    record = device.settle()
    assert (record.phase, record.error_code) == (Phase.REVERTED, "Interrupted")
    assert device.running == first.release_id


@pytest.mark.parametrize(
    "phase", [Phase.STAGING, Phase.PROVING, Phase.SWITCHING, Phase.SOAKING, Phase.COMMITTED]
)
def test_a_full_disk_keeps_no_restarted_device_from_serving(device, first, second, phase):
    commit(device, first)
    device.assign(second, soak_s=60.0)
    device.settle(until=phase)
    device.crash()
    device.boot(is_full=True)
    served = second if phase is Phase.COMMITTED else first
    assert device.running == served.release_id
    device.crash()
    device.boot()
    device.settle()
    ended = first if phase in (Phase.SWITCHING, Phase.SOAKING) else second
    assert device.running == ended.release_id


@pytest.mark.parametrize("step", ["build", "prove", "switch"])
def test_killed_inside_an_effect(device, first, second, step):
    commit(device, first)
    device.host.hooks[step] = failing(Crash())
    device.assign(second)
    with pytest.raises(Crash):
        device.settle()
    device.crash()
    device.boot()
    assert device.running == first.release_id
    expected = Phase.REVERTED if step == "switch" else Phase.COMMITTED
    assert device.settle().phase is expected


@pytest.mark.parametrize("moment", range(1, 14))
def test_killed_right_after_any_write_of_the_record(device, first, second, moment, monkeypatch):
    """Each persisted intent in turn is the last thing the process does."""
    commit(device, first)
    real, left = Reconciler._save, [moment]

    def save_and_die(self, record):
        real(self, record)
        left[0] -= 1
        if left[0] == 0:
            raise Crash

    monkeypatch.setattr(Reconciler, "_save", save_and_die)
    try:
        device.assign(second, soak_s=1.0)
        device.settle()
    except Crash:
        pass
    monkeypatch.undo()
    device.crash()
    device.boot()
    record = device.settle()
    assert record.phase in (Phase.COMMITTED, Phase.REVERTED)
    expected = second if record.phase is Phase.COMMITTED else first
    assert device.running == expected.release_id
    assert str(device.layout.current.readlink()) == f"releases/{expected.release_id}.json"


def test_three_abnormal_exits_of_a_committed_release_bring_the_previous_one_back(
    device, first, second
):
    commit(device, first)
    commit(device, second)
    for _ in range(3):
        assert device.running == second.release_id
        device.crash()
        device.boot()
    record = device.settle()
    assert (record.phase, record.error_code) == (Phase.REVERTED, "AbnormalExits")
    assert device.running == first.release_id
    device.crash()
    device.boot()
    assert device.running == first.release_id


def test_a_first_release_that_crashes_three_times_is_served_no_more(device, first, second):
    commit(device, first)
    for _ in range(3):
        assert device.running == first.release_id
        device.crash()
        device.boot(last_words='{"event": "step.began"}')
    record = device.settle()
    assert (record.phase, record.error_code) == (Phase.FAILED, "AbnormalExits")
    assert first.release_id in record.error_message
    assert "roll out another" in record.error_message
    assert record.error_message.endswith('{"event": "step.began"}')
    assert device.running is None
    device.crash()
    device.boot()
    assert device.settle().phase is Phase.FAILED
    assert device.running is None, "it stays given up"
    commit(device, second)
    assert device.running == second.release_id


def test_exits_under_one_release_do_not_count_against_the_next(device, first, second):
    commit(device, first)
    for _ in range(2):
        device.crash()
        device.boot()
    commit(device, second)
    device.crash()
    device.boot()
    assert (device.settle().phase, device.running) == (Phase.COMMITTED, second.release_id)


def test_power_cuts_are_not_abnormal_exits(device, first, second):
    commit(device, first)
    commit(device, second)
    for n in range(5):
        device.crash()
        device.boot(kernel_boot_id=f"power cycle {n}")
    assert device.running == second.release_id


@pytest.mark.parametrize("phase", [Phase.BUILDING, Phase.PROVING])
@pytest.mark.parametrize("takes_down", ["agent", "machine"])
def test_work_that_takes_agent_or_machine_down_is_not_begun_for_ever(
    device, first, second, phase, takes_down
):
    commit(device, first)
    device.assign(second)
    for n in range(MAX_CUT_WORK):
        assert device.settle(until=phase).phase is phase
        device.crash()
        device.boot(kernel_boot_id="k1" if takes_down == "agent" else f"boot {n}")
    record = device.settle()
    assert (record.phase, record.error_code) == (Phase.FAILED, "AbnormalExits")
    assert f"{MAX_CUT_WORK} times while {phase.value}" in record.error_message
    device.crash()
    device.boot()
    assert device.settle().phase is Phase.FAILED
    assert device.running == first.release_id, "what served is not to blame"


def test_clean_stops_in_the_middle_of_a_build_count_for_nothing(device, first, second):
    commit(device, first)
    device.assign(second)
    for _ in range(2 * MAX_CUT_WORK):
        device.settle(until=Phase.BUILDING)
        device.stop()
        device.boot()
    assert device.settle().phase is Phase.COMMITTED


def test_clean_stops_are_not_abnormal_exits(device, first, second):
    commit(device, first)
    commit(device, second)
    for _ in range(5):
        device.stop()
        device.boot()
    assert device.running == second.release_id


def test_exits_long_ago_are_forgiven(device, first, second):
    commit(device, first)
    commit(device, second)
    for _ in range(5):
        device.clock[0] += 601
        device.reconciler.step()
        device.crash()
        device.boot()
    assert device.running == second.release_id


def test_a_newer_assignment_stops_a_build_and_takes_over(device, first, second, repository):
    third = make_release("third", repository.bundle(3, 10_000))
    commit(device, first)

    def newer_arrives(assignment, progress):
        del device.host.hooks["build"]
        device.assign(third)
        progress("building", 0.5)
        raise AssertionError("progress should have ended the build")

    device.host.hooks["build"] = newer_arrives
    device.assign(second)
    record = device.settle()
    assert (record.phase, record.desired.release_id) == (Phase.COMMITTED, third.release_id)
    assert device.running == third.release_id
    assert record.previous == first.release_id


def test_an_abort_while_soaking_takes_the_device_back_at_once(device, first, second):
    commit(device, first)
    device.assign(second, soak_s=3600.0)
    device.settle(until=Phase.SOAKING)
    device.assign(first)
    record = device.settle()
    assert (record.phase, device.running) == (Phase.COMMITTED, first.release_id)


def test_an_assignment_during_a_switch_waits_for_its_end(device, first, second):
    answers = []
    device.host.hooks["switch"] = lambda assignment, progress: answers.append(device.assign(second))
    device.assign(first)
    device.settle()
    assert answers == [False]
    assert device.running == first.release_id


def test_going_back_to_what_serves_is_immediate(device, first):
    commit(device, first)
    calls = len(device.host.calls)
    commit(device, first)
    assert len(device.host.calls) == calls


def test_when_serving_is_lost_the_committed_release_is_restored(device, first):
    commit(device, first)
    device.host.lose()
    device.settle()
    assert device.running == first.release_id


def test_while_a_release_is_restored_the_device_goes_on_reporting(device, first):
    commit(device, first)
    device.host.lose()
    reported = []

    def report_beside(assignment, progress):
        beside = threading.Thread(target=lambda: reported.append(device.reconciler.report()))
        beside.daemon = True
        beside.start()
        beside.join(60)  # it ends at once
        assert reported, "the report waits for the restore"

    device.host.hooks["switch"] = report_beside
    device.reconciler.step()
    assert reported[0].record.committed == first.release_id


def test_a_committed_release_that_cannot_be_restored_falls_back_to_the_previous(
    device, first, second
):
    commit(device, first)
    commit(device, second)
    device.host.lose()

    def second_is_broken(assignment, progress):
        if assignment.release_id == second.release_id:
            raise EngineFault("engine file damaged")

    device.host.hooks["build"] = second_is_broken
    device.settle()
    assert device.running == first.release_id
    assert "release.restore_failed" in [n for n, _ in device.events]


def test_only_current_previous_and_assigned_stay_on_disk(device, first, second, repository):
    third = make_release("third", repository.bundle(3, 10_000))
    for release in (first, second, third):
        commit(device, release)
    kept = {p.name for p in device.layout.artifacts.iterdir()}
    wanted = {d.removeprefix("sha256:") for d in (*second.all_digests(), *third.all_digests())}
    assert kept == wanted | {f".{name}.manifest" for name in wanted}
    assert {p.stem for p in device.layout.releases.iterdir()} == {
        second.release_id,
        third.release_id,
    }


def test_a_full_disk_under_state_db_stops_nothing_that_serves(device, first, second, monkeypatch):
    commit(device, first)
    device.assign(second)
    real = device.state.save_record
    monkeypatch.setattr(device.state, "save_record", failing_save)
    assert device.reconciler._guarded_step() > 0
    assert device.running == first.release_id
    monkeypatch.setattr(device.state, "save_record", real)
    assert device.settle().phase is Phase.COMMITTED


def failing_save(record, forgives=False):
    raise Exhausted("state.db cannot grow")


def test_an_unreachable_controller_at_boot_costs_nothing(device, first):
    commit(device, first)
    device.stop()
    device.source.manifest_errors = [Unavailable("down")] * 100
    device.boot()
    assert device.running == first.release_id


def test_an_assignment_that_arrives_while_restoring_does_not_stop_it(device, first, second):
    commit(device, first)
    device.host.lose()

    def newer_arrives(assignment, progress):
        device.host.hooks.clear()
        device.assign(second)
        progress("building", 0.5)

    device.host.hooks["build"] = newer_arrives
    device.reconciler._ensure_serving()
    assert device.running == first.release_id
    assert device.settle().phase is Phase.COMMITTED
    assert device.running == second.release_id


def test_stopping_while_restoring_does_not_try_an_older_release(device, first, second):
    commit(device, first)
    commit(device, second)
    device.host.lose()
    calls = len(device.host.calls)

    def stop(assignment, progress):
        device.reconciler.stop()
        progress("building", 0.5)

    device.host.hooks["build"] = stop
    device.reconciler._ensure_serving()
    assert device.host.calls[calls:] == [("build", second.release_id)]
