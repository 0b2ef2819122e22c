"""Messages from the controller are bounded; what is reported says what is."""

from __future__ import annotations

import math

import pytest

from remora_agent.control.activation import Desired, Record
from remora_agent.control.reconcile import Report
from remora_agent.control.wire import (
    MAX_RELEASE_BYTES,
    desired_from,
    metric_messages,
    next_sync_s,
    reported,
    sample_every_s,
)
from remora_agent.telemetry.spool import Sample
from remora_contract.device_phase import Phase
from remora_contract.errors import DocumentInvalid
from remora_protos.control.v1 import control_pb2 as pb


def test_an_empty_assignment_assigns_nothing_of_its_generation():
    desired = desired_from(pb.DesiredState(generation=3))
    assert (desired.generation, desired.release_id) == (3, None)


def test_an_assignment_without_a_generation_is_refused():
    with pytest.raises(DocumentInvalid, match="generation"):
        desired_from(pb.DesiredState(release_id="a-1"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"release_json": b"x" * (MAX_RELEASE_BYTES + 1)}, "too large"),
        ({"soak_s": -1.0}, "soak_s"),
        ({"soak_s": math.nan}, "soak_s"),
        ({"soak_s": math.inf}, "soak_s"),
        ({"release_json": b"\xff"}, "UTF-8"),
    ],
)
def test_absurd_assignments_are_refused(fields, message):
    with pytest.raises(DocumentInvalid, match=message):
        desired_from(pb.DesiredState(generation=1, release_id="a-1", **fields))


@pytest.mark.parametrize(
    ("asked", "answer"), [(10.0, 10.0), (0.0, 30.0), (math.nan, 30.0), (1e9, 3600.0), (1e-9, 0.05)]
)
def test_the_controller_cannot_make_the_device_spin_or_sleep_forever(asked, answer):
    assert next_sync_s(pb.SyncResponse(next_sync_after_s=asked)) == answer


@pytest.mark.parametrize(
    ("asked", "answer"), [(0.0, 0.0), (60.0, 60.0), (-1.0, 0.0), (math.nan, 0.0), (1e9, 3600.0)]
)
def test_the_controller_cannot_make_the_device_measure_nothing_for_ever(asked, answer):
    assert sample_every_s(pb.SyncResponse(sample_every_s=asked)) == answer


def test_a_report_carries_error_and_bounded_text():
    desired = Desired(7, "a-1", "{}", "r", 0.0, False)
    record = Record(desired, Phase.FAILED, 0.0, None, None, "EngineFault", "x" * 10_000)
    message = reported(Report(record, 0.5), None)
    assert (message.phase, message.generation, message.error_code) == ("FAILED", 7, "EngineFault")
    assert len(message.error_message) == 2000
    assert message.running_release_id == ""


def test_a_device_told_to_keep_what_it_runs_says_so_for_that_generation():
    record = Record(Desired(8, None, "", "r", 0.0, True), Phase.UNASSIGNED, 0.0, "a-1")
    message = reported(Report(record, 0.0), None)
    assert (message.phase, message.generation, message.release_id) == ("UNASSIGNED", 8, "")


def test_a_device_without_assignment_reports_no_phase():
    assert reported(Report(None, 0.0), None).phase == ""


def test_numbers_that_are_none_do_not_travel():
    samples = [Sample("a", 1.0, 0.0), Sample("b", math.nan, 0.0), Sample("c", math.inf, 0.0)]
    assert [m.name for m in metric_messages(samples)] == ["a"]
