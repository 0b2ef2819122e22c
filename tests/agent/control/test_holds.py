"""A release that is ready waits for its window and for locks, and never for ever."""

from __future__ import annotations

import json
from datetime import datetime, timezone

import grpc
import pytest
from typer.testing import CliRunner

from remora_agent.cli import build_app
from remora_agent.control.activation import Desired
from remora_agent.serving.address import parse_address
from remora_agent.serving.lock_command import seconds
from remora_agent.serving.router import Router
from remora_agent.serving.server import InferenceServer, ServerOptions
from remora_agent.update_locks import MAX_LOCKS, MAX_TEXT, LockBook
from remora_contract.device_phase import Phase
from remora_contract.digests import canonical_json
from remora_contract.errors import Exhausted, NotFound, RequestInvalid, UsageWrong
from remora_protos.inference.v1 import inference_pb2 as pb
from remora_protos.inference.v1 import inference_pb2_grpc as rpc
from tests.agent.control.device import Device
from tests.support.repository import Repository, make_release

NOON = datetime(2026, 5, 6, 12, tzinfo=timezone.utc).timestamp()
ROBOT = "\N{ROBOT FACE}"


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path / "repository")


@pytest.fixture
def device(tmp_path, repository):
    made = Device(tmp_path / "state", repository.root)
    made.clock[0] = NOON
    yield made
    made.database.close()


@pytest.fixture
def release(repository):
    return make_release("first", repository.bundle(1, 120_000), repository.adapter(11))


def ready(device: Device, release) -> None:
    device.assign(release)
    device.settle(Phase.WAIT_WINDOW)
    assert device.record.phase is Phase.WAIT_WINDOW


def steps(device: Device, seconds_: float) -> Phase:
    """Whatever the device does within that time."""
    until = device.clock[0] + seconds_
    while device.clock[0] < until:
        wait_s = device.reconciler.step()
        device.clock[0] = min(until, device.clock[0] + (wait_s or 0.01))
    device.reconciler.step()
    return device.record.phase


def test_a_device_does_not_switch_outside_its_window(device, release):
    device.holds.set_windows(["12:10-13:00"])
    ready(device, release)
    assert steps(device, 599) is Phase.WAIT_WINDOW
    hold = device.reconciler.report().hold
    assert hold.why == "outside its maintenance window, which opens 2026-05-06T12:10+00:00"
    assert hold.until_unix_s == NOON + 600
    assert steps(device, 5) is Phase.COMMITTED


def test_windows_outlive_a_restart_without_a_controller(device, release):
    device.holds.set_windows(["22:00-23:00"])
    ready(device, release)
    device.crash()
    device.boot()
    assert steps(device, 60) is Phase.WAIT_WINDOW
    device.holds.set_windows([])
    assert steps(device, 2) is Phase.COMMITTED


def test_a_window_that_cannot_be_read_holds_and_says_so(device, release):
    device.holds.set_windows(["at night"])
    ready(device, release)
    assert steps(device, 60) is Phase.WAIT_WINDOW
    assert "cannot be read" in device.reconciler.report().hold.why


def test_a_way_back_does_not_wait_for_the_window_but_for_a_lock(device, release, repository):
    device.assign(release)
    device.settle()
    other = make_release("other", repository.bundle(2, 120_000))
    device.holds.set_windows(["22:00-23:00"])
    device.locks.lock("robot", "moving", 30.0)
    document = canonical_json(other).decode()
    device.generation += 1
    device.reconciler.assign(
        Desired(device.generation, other.release_id, document, "r1", 0.0, is_rollback=True)
    )
    device.settle(Phase.WAIT_WINDOW)
    assert steps(device, 20) is Phase.WAIT_WINDOW
    assert device.reconciler.report().hold.why == "locked by robot (moving)"
    assert steps(device, 15) is Phase.COMMITTED


def test_locks_prolonged_for_ever_hold_one_update_up_no_longer_than_the_maximum(device, release):
    device.locks.lock("robot", "", 600.0)
    ready(device, release)
    for _ in range(59):
        device.locks.lock("robot", "", 600.0)
        assert steps(device, 10) is Phase.WAIT_WINDOW
    device.crash()
    device.boot()  # does not begin to count again
    device.locks.lock("robot", "", 600.0)
    assert steps(device, 15) is Phase.COMMITTED


def test_a_lock_ends_by_itself_and_by_its_owner(tmp_path):
    now = [NOON]
    book = LockBook(tmp_path / "locks.json", lambda: now[0], 600.0)
    book.lock("a", "", 10.0)
    book.lock("b", "busy", 20.0)
    assert [x.owner for x in LockBook(tmp_path / "locks.json", lambda: now[0], 600.0).locks()] == [
        "a",
        "b",
    ]
    now[0] += 10
    assert [x.owner for x in book.locks()] == ["b"]
    assert book.unlock("b") == ()
    with pytest.raises(NotFound):
        book.unlock("b")


def test_as_many_locks_as_there_may_be_are_all_held_however_long_their_texts(tmp_path):
    book = LockBook(tmp_path / "locks.json", lambda: NOON, 600.0)
    for i in range(MAX_LOCKS):
        book.lock(f"{i:03}" + ROBOT * (MAX_TEXT - 3), ROBOT * MAX_TEXT, 60.0)
    assert len(book.locks()) == MAX_LOCKS
    with pytest.raises(Exhausted):
        book.lock("one more", "", 60.0)


@pytest.mark.parametrize(
    ("owner", "for_s"), [("", 1.0), ("a", 0.0), ("a", 601.0), ("a", float("nan")), ("x" * 200, 1.0)]
)
def test_a_lock_that_makes_no_sense_is_refused(tmp_path, owner, for_s):
    with pytest.raises(RequestInvalid):
        LockBook(tmp_path / "locks.json", lambda: NOON, 600.0).lock(owner, "", for_s)


@pytest.mark.parametrize("content", [b"", b"{", b'{"locks": [{}]}', b"\xff" * 70_000])
def test_a_damaged_file_stops_no_update(tmp_path, content):
    path = tmp_path / "locks.json"
    path.write_bytes(content)
    assert LockBook(path, lambda: NOON, 600.0).locks() == ()


def test_a_clock_put_back_makes_no_lock_longer_than_the_maximum(tmp_path):
    now = [NOON]
    book = LockBook(tmp_path / "locks.json", lambda: now[0], 600.0)
    book.lock("a", "", 600.0)
    now[0] -= 3600
    assert book.locks() == ()


@pytest.mark.parametrize(("text", "wanted"), [("90", 90), ("90s", 90), ("1.5m", 90), ("1h", 3600)])
def test_durations_are_read(text, wanted):
    assert seconds(text) == wanted


def test_a_duration_that_is_none_is_wrong_usage():
    with pytest.raises(UsageWrong):
        seconds("soon")


@pytest.mark.parametrize("with_book", [True, False])
def test_the_command_asks_the_agent_over_its_own_socket(tmp_path, with_book):
    path = tmp_path / "locks.json"
    book = LockBook(path, lambda: NOON, 600.0) if with_book else None
    options = ServerOptions(parse_address(f"unix:{tmp_path}/s"), update_locks=book)
    server = InferenceServer(Router(), options)
    address = server.start().target()
    try:
        arguments = ["lock", "--for", "10m", "--reason", "demo", "--address", address]
        result = CliRunner().invoke(build_app(), arguments)
        if not with_book:
            assert "remora-agent run takes locks" in str(result.exception)
            return
        assert result.exit_code == 0
        assert [x.owner for x in book.locks()] == ["cli"]
        shown = CliRunner().invoke(build_app(), ["lock", "--json", "--address", address])
        assert json.loads(shown.stdout) == {
            "locks": [{"owner": "cli", "reason": "demo", "until_unix_s": NOON + 600.0}],
            "max_lock_s": 600.0,
        }
        assert CliRunner().invoke(build_app(), ["unlock", "--address", address]).exit_code == 0
        with grpc.insecure_channel(address) as channel:
            status = rpc.UpdateLocksStub(channel).Status(pb.UpdateLockStatusRequest())
        assert (list(status.locks), status.max_lock_s) == ([], 600.0)
    finally:
        server.stop()
