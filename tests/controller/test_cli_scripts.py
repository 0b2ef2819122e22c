"""What scripts rely on: exit codes, one document on standard output, restarts of the controller."""

from __future__ import annotations

import pytest
import yaml

from remora_contract.errors import NotFound, Unavailable, UsageWrong
from remora_controller.operator_cli.following import PATIENCE_S, patiently
from tests.controller.test_cli import Remora, create, online, publish_first, run


@pytest.fixture
def remora(world):
    return Remora(world)


def test_a_rollout_that_is_watched_gives_one_document(world, remora):
    publish_first(world)
    devices = online(world, 1)
    create(remora)
    started = remora.json("rollout", "start", "assistant", "--soak", "0")
    world.drive(started["rollout_id"], devices, "COMPLETED")
    assert remora.json("rollout", "status", "--watch")["state"] == "COMPLETED"
    watched = remora.json(
        "rollout", "start", "assistant", "--soak", "0", "--not-before", "2020-01-01"
    )
    world.drive(watched["rollout_id"], devices, "COMPLETED")
    assert yaml.safe_load(remora("rollout", "status", "-w", "--yaml"))["attempt"] == 1


def test_groups_of_commands_list_when_they_are_named_alone(world, remora):
    publish_first(world)
    first, _ = online(world, 2)
    create(remora)
    only = ("-l", f"id={first.device_id}")
    assert [d["device_id"] for d in remora.json("devices", *only)] == [first.device_id]
    for group in ("adapters", "releases", "groups", "engines", "usecases"):
        assert remora.json(group) == remora.json(group, "list")
    for words in (("--json", "list"), (*only, "list"), ("--yaml", "show", first.device_id)):
        with pytest.raises(UsageWrong, match="behind the command"):
            remora("devices", *words)


def test_use_cases_show_what_they_mix_where_they_are_and_who_serves_them(world, remora, tmp_path):
    publish_first(world)
    (device,) = online(world, 1)
    file = tmp_path / "release.yaml"
    text = "bundle: tiny\nadapters: {{sql: sql@1}}\nuse_cases: {{report: {{sql: {}}}}}\n"
    ids = []
    for name, weight in (("one", 0.5), ("two", 0.5), ("three", 1)):
        file.write_text(f"name: {name}\n" + text.format(weight))
        ids.append(remora.json("releases", "create", "--file", str(file))["release_id"])
    started = remora.json("rollout", "start", "two", "--soak", "0")
    world.drive(started["rollout_id"], [device], "COMPLETED")
    half = {
        "use_case": "report",
        "adapters": [{"adapter": "sql@1", "weight": 0.5}],
        "releases": [ids[1], ids[0]],
        "devices": [device.device_id],
    }
    found = remora.json("usecases")
    assert half in found and len(found) == 2
    assert remora.json("usecases", "list", "--running") == [half]
    assert "sql@1:0.5" in remora("usecases")


def test_events_of_a_device_that_never_was_are_no_empty_list(world, remora):
    (device,) = online(world, 1)
    with pytest.raises(NotFound, match="no device d-none"):
        remora("events", "--device", "d-none")
    remora("devices", "remove", device.device_id)
    remora("events", "--device", device.device_id)


def test_releases_that_are_the_same_say_so(world, remora):
    publish_first(world)
    create(remora)
    assert remora("releases", "diff", "assistant", "assistant") == "no difference\n"


class Silence:
    """A controller that does not answer until `until`, on a clock of its own."""

    def __init__(self, until: float) -> None:
        self.until, self.now = until, 0.0

    def ask(self) -> str:
        if self.now < self.until:
            raise Unavailable("no answer")
        return "COMPLETED"

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_controller_that_restarts_is_waited_for():
    silence = Silence(60.0)
    found = patiently(silence.ask, None, lambda: silence.now, silence.sleep)
    assert found == "COMPLETED" and silence.now == 60.0


@pytest.mark.parametrize(("deadline", "gave_up_at"), [(None, PATIENCE_S), (10.0, 10.0)])
def test_one_that_stays_away_is_not_waited_for_for_ever(deadline, gave_up_at):
    silence = Silence(1e9)
    with pytest.raises(Unavailable):
        patiently(silence.ask, deadline, lambda: silence.now, silence.sleep)
    assert silence.now == gave_up_at


def test_time_that_is_up_is_exit_code_4(world, remora):
    publish_first(world)
    online(world, 1)
    create(remora)
    remora("rollout", "start", "assistant")
    ended = run(
        "rollout",
        "wait",
        "--timeout",
        "0",
        REMORA_CREDENTIALS=str(world.home.operator),
        REMORA_CONTROLLER=f"127.0.0.1:{world.ports.fleet}",
    )
    assert (ended.returncode, ended.stdout) == (4, "")


def test_what_a_rollout_waits_for_and_who_took_its_devices_over_is_said(world, remora):
    publish_first(world)
    devices = online(world, 1)
    create(remora)
    start = ("rollout", "start", "assistant", "--soak", "0")
    waiting = remora.json(*start, "--not-before", "2099-01-01")["rollout_id"]
    assert "touches nothing before 2099-01-01" in remora("rollout", "status", waiting)
    remora("rollout", "abort", waiting)
    world.drive(waiting, [], "ABORTED")
    assert "no device was touched" in remora("rollout", "status", waiting)
    first = remora.json(*start)["rollout_id"]
    world.drive(first, [], "RUNNING")
    second = remora.json(*start, "--supersede")["rollout_id"]
    (device,) = remora.json("rollout", "status", first)["devices"]
    assert (device["outcome"], device["error"]) == ("apart", f"superseded by {second}")
    world.drive(second, devices, "COMPLETED")


def test_a_controller_that_listens_elsewhere_can_be_named(world, remora):
    where = ("--credentials", str(world.home.operator), "--controller", "127.0.0.1:1")
    asked = run(*where, "whoami")
    assert asked.returncode == 1
    assert "--controller HOST:PORT or REMORA_CONTROLLER" in asked.stderr
