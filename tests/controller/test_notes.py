"""What the operator is told about a device beside its status."""

from __future__ import annotations

from dataclasses import replace

from remora_controller.domain import Device, Facts, Report
from remora_controller.notes import device_note, replacements


def device(device_id: str, enrolled_at: float, machine: str = "m1", host: str = "orin") -> Device:
    return Device(device_id, enrolled_at, "key", Facts(machine_id=machine, hostname=host))


def test_a_machine_that_joined_again_stands_for_its_earlier_identities():
    old, older = device("b", 20.0), device("a", 10.0)
    new = device("c", 30.0)
    seen = {"a": 15.0, "b": 29.0, "c": 31.0}
    found = replacements([new, old, older], seen)
    assert found == {"a": "c", "b": "c"}
    assert device_note(old, found) == "joined again as c: remove this one"
    assert device_note(new, found) == ""


def test_cloned_images_are_not_taken_for_one_machine():
    """Both call: they are two, whatever their machine id says."""
    devices = [device("a", 10.0), device("b", 20.0)]
    assert replacements(devices, {"a": 25.0, "b": 25.0}) == {}
    other_host = [device("a", 10.0), device("b", 20.0, host="nano")]
    assert replacements(other_host, {"a": 15.0, "b": 25.0}) == {}
    unknown = [device("a", 10.0, machine=""), device("b", 20.0, machine="")]
    assert replacements(unknown, {}) == {}


def test_a_quarantined_and_a_removed_device_come_with_the_next_step():
    quarantined = replace(device("a", 1.0), quarantine="boot 1 spoke again")
    assert "remove it, join each again" in device_note(quarantined, {})
    assert "still calls" in device_note(replace(quarantined, removed_at=5.0), {})


def test_a_device_that_did_not_take_its_release_says_why_and_what_it_runs():
    """Nobody watches a late joiner: no rollout shows it."""
    failed = Report(
        "REVERTED", 3, "bad-1", "good-1", error_code="GoldenMismatch", error_message="x"
    )
    assert device_note(replace(device("a", 1.0), report=failed), {}) == (
        "REVERTED bad-1 (GoldenMismatch: x); runs good-1"
    )
    endless = replace(failed, phase="FAILED", error_message="y" * 5000, running_release_id="")
    note = device_note(replace(device("a", 1.0), report=endless), {})
    assert len(note) == 300
    for phase in ("COMMITTED", "UNASSIGNED", "SOAKING", "", "OF_A_NEWER_AGENT"):
        assert device_note(replace(device("a", 1.0), report=replace(failed, phase=phase)), {}) == ""
