"""The command `remora` against a real controller."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from remora_contract.errors import (
    DeadlineExceeded,
    NotFound,
    Refused,
    RemoraError,
    RequestInvalid,
)
from remora_contract.join_token import JoinToken
from remora_contract.yaml_text import load_yaml
from remora_controller.operator_cli import reference, release_document, top
from remora_controller.operator_cli.app import app
from remora_controller.operator_cli.session import Session
from remora_protos.control.v1 import control_pb2 as cp
from tests.controller import artifacts
from tests.controller.harness import SimulatedDevice, wait_for

MAIN = "from remora_controller.operator_cli.app import main; main()"
ROOT = Path(__file__).resolve().parents[2]


class Remora:
    """Types commands; gives standard output. Errors come as what `main` would print."""

    def __init__(self, world) -> None:
        self._globals = [
            "--credentials",
            str(world.home.operator),
            "--controller",
            f"127.0.0.1:{world.ports.fleet}",
        ]

    def __call__(self, *words: str) -> str:
        result = CliRunner().invoke(app, [*self._globals, *words])
        if isinstance(result.exception, RemoraError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    def json(self, *words: str):
        return json.loads(self(*words, "--json"))


def exit_code(world, *words: str) -> int:
    return CliRunner().invoke(app, [*Remora(world)._globals, *words]).exit_code


@pytest.fixture
def remora(world):
    return Remora(world)


def online(world, count: int, **labels: str) -> list[SimulatedDevice]:
    devices = [world.device(**labels) for _ in range(count)]
    for device in devices:
        device.sync()
    return devices


def publish_first(world) -> None:
    artifacts.bundle(world.home.repository)
    artifacts.adapter(world.home.repository, "sql", "1")
    artifacts.adapter(world.home.repository, "chat", "1")


def test_a_token_goes_to_standard_output_alone(remora):
    assert JoinToken.decode(remora("devices", "token", "--label", "site=berlin"))


def test_devices_are_listed_selected_labelled_shown_and_removed(world, remora):
    berlin, paris = online(world, 1, site="berlin") + online(world, 1, site="paris")
    assert berlin.device_id in remora("devices") and paris.device_id in remora("devices", "list")
    (only,) = remora.json("devices", "list", "-l", "site=paris")
    assert (only["device_id"], only["status"]) == (paris.device_id, "online")
    remora("devices", "label", paris.device_id, "tier=prod", "site-")
    assert remora.json("devices", "show", paris.device_id)["labels"] == {"tier": "prod"}
    assert "tier=prod" in remora("devices", "show", paris.device_id)
    remora("devices", "remove", paris.device_id)
    assert [d["device_id"] for d in remora.json("devices", "list")] == [berlin.device_id]
    with pytest.raises(NotFound, match="remora devices"):
        remora("devices", "show", paris.device_id)


def test_a_release_from_flags_is_resolved_to_digests(world, remora):
    publish_first(world)
    remora(
        "releases", "create", "--name", "assistant", "--bundle", "tiny",
        "--adapter", "sql=sql@1", "--adapter", "chat=chat", "--use-case", "both=sql:0.7,chat:0.3",
    )  # fmt: skip
    (listed,) = remora.json("releases", "list")
    release = listed["release"]
    assert release["bundle"].startswith("sha256:")
    assert [(a["name"], a["revision"]) for a in release["adapters"]] == [
        ("sql", "1"),
        ("chat", "1"),
    ]
    assert release["use_cases"][0]["adapters"][0] == {"name": "sql", "weight": 0.7}
    assert listed["created_by"] == "operator"
    assert "sql@1, chat@1" in remora("releases")
    assert json.loads(remora("releases", "show", "assistant")) == listed


def test_a_release_from_a_file_is_strict(world, remora, tmp_path):
    publish_first(world)
    file = tmp_path / "release.yaml"
    text = "name: filed\nbundle: tiny@1\nadapters: {sql: sql@1}\nsampling: {temperature: 0.5}\n"
    file.write_text(text)
    assert "created release filed-" in remora("releases", "create", "--file", str(file))
    file.write_text(text + "adaptors: {}\n")
    with pytest.raises(RemoraError, match=r"unknown key 'adaptors'"):
        remora("releases", "create", "--file", str(file))
    with pytest.raises(RequestInvalid, match="leave the other options out"):
        remora("releases", "create", "--file", str(file), "--name", "x")
    with pytest.raises(RequestInvalid, match="--name and --bundle"):
        remora("releases", "create")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bundle", "nothing"], r"no bundle nothing .*there: tiny@1"),
        (["--bundle", "tiny", "--adapter", "sql=sql@9"], "no adapter sql@9"),
        (["--bundle", "tiny", "--adapter", "sql"], "write NAME=REF"),
        (["--bundle", "tiny", "--use-case", "u=sql:x"], "is no number"),
        (["--bundle", "tiny", "--use-case", "u=sql"], "unknown adapter sql"),
    ],
)
def test_what_a_release_cannot_name_is_refused(world, remora, words, said):
    publish_first(world)
    with pytest.raises(RemoraError, match=said):
        remora("releases", "create", "--name", "r", *words)


def create(remora: Remora, name: str = "assistant") -> str:
    words = ("--name", name, "--bundle", "tiny", "--adapter", "sql=sql@1", "--adapter", "chat=chat")
    return remora.json("releases", "create", *words)["release_id"]


def test_plan_start_status_wait_and_list(world, remora):
    publish_first(world)
    devices = online(world, 3)
    release = create(remora)
    plan = remora.json("plan", release, "--wave", "1", "--wave", "50%")
    assert [d["wave"] for d in plan["devices"]] == [1, 2, 3]
    assert "wave 1: 1 devices, wave 2: 1 devices, wave 3: 1 devices" in remora(
        "plan", "assistant", "--wave", "1", "--wave", "50%"
    )
    started = remora.json("rollout", "start", "assistant", "--soak", "0")
    assert started["state"] == "RUNNING"
    assert started["spec"]["wave_timeout_s"] == 3600
    assert "RUNNING" in remora("rollout", "status")
    world.drive(started["rollout_id"], devices, "COMPLETED")
    assert "COMPLETED: 3 succeeded" in remora("rollout", "wait", started["rollout_id"])
    assert "succeeded 3" in remora("rollout", "status", "--watch")
    (listed,) = remora.json("rollout", "list")
    assert listed["release_name"] == "assistant"
    assert "COMPLETED" in remora("rollout", "list")
    with pytest.raises(Refused, match="start a new rollout"):
        remora("rollout", "abort")


def test_pause_resume_abort_from_the_command_line(world, remora):
    publish_first(world)
    online(world, 2)
    create(remora)
    remora("rollout", "start", "assistant")
    assert "PAUSED" in remora("rollout", "pause")
    for words in (("wait",), ("status", "--watch")):
        assert exit_code(world, "rollout", *words) == 5
    assert "RUNNING" in remora("rollout", "resume")
    with pytest.raises(DeadlineExceeded, match="still RUNNING after 0 s"):
        remora("rollout", "wait", "--timeout", "0")
    assert "ABORTING" in remora("rollout", "abort", "--keep")


def test_shipping_an_adapter_is_one_command(world, remora):
    publish_first(world)
    devices = online(world, 2)
    first = create(remora)
    started = remora.json("rollout", "start", first, "--soak", "0")
    world.drive(started["rollout_id"], devices, "COMPLETED")
    newer = artifacts.adapter(world.home.repository, "sql", "2")
    shipped = remora.json("adapters", "ship", "sql=sql@2", "--soak", "0")
    done = world.drive(shipped["rollout_id"], devices, "COMPLETED")
    release = json.loads(remora("releases", "show", done.release_id))["release"]
    assert release["name"] == "assistant"
    assert {a["name"]: a["revision"] for a in release["adapters"]} == {"chat": "1", "sql": "2"}
    assert newer.digest in {a["digest"] for a in release["adapters"]}
    again = remora.json("rollout", "start", "--adapter", "sql=sql@1", "--soak", "0")
    assert world.drive(again["rollout_id"], devices, "COMPLETED").state == "COMPLETED"


def test_a_plan_of_an_adapter_is_what_shipping_it_brings_and_makes_no_release(world, remora):
    publish_first(world)
    artifacts.adapter(world.home.repository, "sql", "2")
    devices = online(world, 2)
    rollout = remora.json("rollout", "start", create(remora), "--soak", "0")["rollout_id"]
    world.drive(rollout, devices, "COMPLETED")
    before = remora.json("releases", "list")
    planned = remora.json("plan", "--adapter", "sql=sql@2")
    assert remora.json("releases", "list") == before
    assert len(planned["devices"]) == 2 and int(planned["total_bytes"]) > 0
    shipped = remora.json("adapters", "ship", "sql=sql@2", "--gate", "ttft: p95(ttft_s) < 9")
    assert [g["name"] for g in shipped["spec"]["gates"]] == ["ttft"]
    stored = remora.json("plan", shipped["release_id"])
    assert stored == planned
    with pytest.raises(RemoraError, match="name a RELEASE, or an adapter"):
        remora("plan")


def test_shipping_to_devices_that_differ_asks_which_release_is_meant(world, remora):
    publish_first(world)
    one, other = online(world, 1, site="a") + online(world, 1, site="b")
    for device, site, name in ((one, "a", "r-one"), (other, "b", "r-two")):
        create(remora, name)
        started = remora.json("rollout", "start", name, "-l", f"site={site}", "--soak", "0")
        world.drive(started["rollout_id"], [device], "COMPLETED")
    with pytest.raises(Refused, match=r"different releases.*--from RELEASE"):
        remora("adapters", "ship", "sql=sql@1")
    assert "started rollout" in remora("adapters", "ship", "sql=sql@1", "--from", "r-one")


def test_shipping_to_devices_that_run_nothing_is_refused(world, remora):
    publish_first(world)
    online(world, 1)
    with pytest.raises(Refused, match="no matching device runs a release"):
        remora("adapters", "ship", "sql=sql@1")


def test_adapters_and_bundles_show_who_serves_them(world, remora):
    publish_first(world)
    (device,) = online(world, 1)
    (bundle,) = remora.json("bundles")
    device.bundle_digest = bundle["digest"]
    device.sync()
    assert remora.json("bundles")[0]["devices"] == [device.device_id]
    assert device.device_id in remora("bundles")
    assert [a["devices"] for a in remora.json("adapters", "list")] == [[], []]
    assert "sql" in remora("adapters")


def test_top_shows_telemetry(world, remora):
    (device,) = online(world, 1)
    values = {
        "tokens_per_s": 51.25,
        "ttft_s": 0.042,
        "memory_used_bytes": 3e9,
        "memory_total_bytes": 4e9,
        "cpu_load": 0.5,
        "temperature_celsius.cpu": 40.0,
        "temperature_celsius.gpu": 61.0,
    }
    device.sync(metrics=[cp.Metric(name=n, value=v, at_unix_s=1.0) for n, v in values.items()])
    text = remora("top", "--once")
    for shown in ("51.2", "42 ms", "75%", "50%", "61 °C"):
        assert shown in text, text
    (row,) = remora.json("top")
    assert row["metrics"]["tokens_per_s"] == 51.25
    assert row["device"]["status"] == "online"


def test_a_device_without_telemetry_shows_dashes_not_zeros():
    assert [column.read({}) for column in top.COLUMNS] == [None] * len(top.COLUMNS)


def test_what_devices_say_is_text_and_neither_markup_nor_control(world, remora):
    (device,) = online(world, 1)
    device.facts.device_model = "[/red] \x1b]0;owned\x07"
    detail = json.dumps({"error": "see [/tmp/x] \x1b[2J"})
    device.sync(events=[cp.DeviceEvent(seq=1, name="engine.failed", detail_json=detail)])
    shown = remora("events") + remora("devices") + remora("devices", "show", device.device_id)
    assert "error=see [/tmp/x] \\x1b[2J" in shown
    assert shown.count("[/red] \\x1b]0;owned\\x07") == 2
    assert "\x1b" not in shown
    assert remora.json("events")[0]["detail"] == {"error": "see [/tmp/x] \x1b[2J"}


def test_events_tell_what_happened(world, remora):
    (device,) = online(world, 1)
    detail = '{"seconds": 3, "engine": "abc"}'
    device.sync(events=[cp.DeviceEvent(seq=1, name="engine.built", detail_json=detail)])
    assert "seconds=3 engine=abc" in remora("events")
    (event,) = remora.json("events", "--device", device.device_id)
    assert event["detail"] == {"seconds": 3, "engine": "abc"}


def test_a_rollout_that_went_back_fails_the_wait_and_says_where_to_look(world, remora):
    publish_first(world)
    devices = online(world, 2)
    release = create(remora)
    started = remora.json("rollout", "start", release, "--soak", "0", "--wave", "2")
    devices[0].bad_releases = {release}
    world.drive(started["rollout_id"], devices, "ROLLED_BACK")
    with pytest.raises(Refused, match=r"is ROLLED_BACK: .*remora events"):
        remora("rollout", "wait")


# -- as a process --------------------------------------------------------------------------


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "from remora_controller.operator_cli.app import main; main()",
            *words,
        ],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_a_refusal_is_one_line_on_stderr_and_exit_code_1(tmp_path):
    ended = run("devices", REMORA_CREDENTIALS=str(tmp_path))
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.startswith(f"error: no operator credentials in {tmp_path}")
    assert ended.stderr.count("\n") == 1


def test_wrong_usage_is_exit_code_2():
    assert run("devices", "label").returncode == 2
    assert run("no-such-command").returncode == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("rollout", "start"), "name a RELEASE"),
        (("rollout", "start", "r", "--wave", "0"), "--wave '0'"),
        (("rollout", "start", "r", "--wave", "101%"), "--wave '101%'"),
        (("rollout", "start", "--adapter", "a=a", "--wave", "0"), "--wave '0'"),
        (("adapters", "ship", "a=a", "--wave", "0"), "--wave '0'"),
    ],
)
def test_words_that_cannot_be_meant_are_wrong_usage(world, words, said):
    ended = run(*words, REMORA_CREDENTIALS=str(world.home.operator))
    assert ended.returncode == 2
    assert said in ended.stderr


def test_an_unreachable_controller_is_named(world):
    ended = run(
        "devices",
        REMORA_CREDENTIALS=str(world.home.operator),
        REMORA_CONTROLLER="127.0.0.1:1",
    )
    assert ended.returncode == 1
    assert "no answer from the controller at 127.0.0.1:1" in ended.stderr


def test_json_into_a_pipe_is_only_json(world):
    online(world, 1)
    ended = run(
        "devices", "list", "--json",
        REMORA_CREDENTIALS=str(world.home.operator),
        REMORA_CONTROLLER=f"127.0.0.1:{world.ports.fleet}",
    )  # fmt: skip
    assert len(json.loads(ended.stdout)) == 1


# -- documents and reference ---------------------------------------------------------------


def test_the_operator_reference_is_what_the_commands_say():
    committed = (ROOT / "docs" / "operator.md").read_text()
    assert committed == reference.reference(), (
        "run: python -m remora_controller.operator_cli.reference > docs/operator.md"
    )


def commands(group, path=("remora",)):
    for name, child in getattr(group, "commands", {}).items():
        yield (*path, name), child
        yield from commands(child, (*path, name))


def test_every_command_and_option_has_help():
    found = list(commands(typer.main.get_command(app)))
    assert len(found) > 20
    for path, command in found:
        assert command.help, path
        for parameter in command.params:
            assert parameter.help, (path, parameter.name)


def test_a_derived_release_changes_only_what_it_names(tmp_path):
    bundle = artifacts.bundle(tmp_path)
    one, two = artifacts.adapter(tmp_path, "a", "1"), artifacts.adapter(tmp_path, "b", "1")
    newer = artifacts.adapter(tmp_path, "a", "2")
    base = artifacts.release("r", bundle, one, two)
    derived = release_document.derive(base, {"a": "a@2", "c": "a@1"}, [newer, one, two])
    assert {a.name: a.digest for a in derived.adapters} == {
        "a": newer.digest,
        "b": two.digest,
        "c": one.digest,
    }
    assert (derived.name, derived.bundle) == (base.name, base.bundle)


def test_a_reference_by_digest_and_the_newest_by_name(tmp_path):
    old, new = artifacts.adapter(tmp_path, "a", "1"), artifacts.adapter(tmp_path, "a", "2")
    listed = [new, old]
    assert release_document.resolve("a", "adapter", listed) is new
    assert release_document.resolve(old.digest, "adapter", listed) is old
    assert release_document.resolve("a@1", "adapter", listed) is old


def test_waiting_devices_become_assigned(world, remora):
    publish_first(world)
    (device,) = online(world, 1)
    remora("rollout", "start", create(remora), "--soak", "7")
    wait_for("it is assigned", lambda: device.sync() and device.generation == 1)
    assert device.desired.soak_s == 7


def test_governing_from_the_command_line(world, remora):
    first, second = online(world, 2)
    publish_first(world)
    assert remora.json("whoami")["role"] == "admin"
    listed = remora.json("devices", "list")
    assert load_yaml(remora("devices", "list", "--yaml").encode(), "devices") == listed
    remora("groups", "create", "canary", "--device", first.device_id)
    assert remora("groups", "show", "canary").split() == [first.device_id]
    assert remora.json("groups", "list")[0]["matching"] == 1
    assert "pinned: demo" in remora("devices", "pin", second.device_id, "--reason", "demo")
    assert "is quarantined" in remora("devices", "quarantine", second.device_id)
    assert "is online" in remora("devices", "quarantine", second.device_id, "--lift")
    assert "not pinned" in remora("devices", "pin", second.device_id, "--remove")
    remora("releases", "create", "--name", "a", "--bundle", "tiny")
    remora("releases", "create", "--name", "b", "--bundle", "tiny", "--adapter", "sql=sql@1")
    assert "adapters.sql.revision" in remora("releases", "diff", "a", "b")
    started = remora("rollout", "start", "a", "-l", "group=canary", "--needs-approval")
    assert "somebody else" in started
    with pytest.raises(RemoraError, match="somebody else has to approve"):
        remora("rollout", "approve", remora.json("rollout", "list")[0]["rollout_id"])
    assert "rollout.started" in remora("rollout", "history")
    assert "StartRollout" in remora("audit", "--since", "1h")
    assert remora("audit", "--head").partition(":")[0].isdigit()
    remora("rollout", "abort")
    wait_for("it ends", lambda: remora.json("rollout", "list")[0]["state"] == "ABORTED")
    remora("groups", "delete", "canary")
    assert remora.json("groups", "list") == []


FLEET = """\
groups:
  canary: {{devices: [{device}]}}
  others: {{selector: not group=canary}}
labels:
  {device}: {{site: berlin, legacy: null}}
pins:
  {other}: on show
releases:
  assistant:
    bundle: tiny@1
    adapters: {{sql: sql@1}}
    sampling: {{temperature: 0.2}}
rollouts:
  canaries:
    release: assistant
    selector: group=canary
    waves: [1, 50%]
    needs_approval: true
    gates: [{{name: ttft, check: p95(ttft_s) < 0.8}}]
    stratify: [site]
    windows: ["02:00-05:00"]
    not_before: "2026-05-01T00:00+00:00"
    device_bandwidth: 500K
"""


def apply(world, *words: str) -> tuple[int, str]:
    words = (*Remora(world)._globals, "apply", *words)
    result = CliRunner().invoke(app, list(words))
    if isinstance(result.exception, RemoraError):
        raise result.exception
    return result.exit_code, result.stdout


def test_applying_files_changes_what_differs_and_then_nothing(world, remora, tmp_path):
    device, other = online(world, 2)
    publish_first(world)
    folder = tmp_path / "fleet"
    folder.mkdir()
    text = FLEET.format(device=device.device_id, other=other.device_id)
    (folder / "all.yaml").write_text(text.replace("waves: [1, 50%]", 'waves: ["1", 50%]'))
    code, shown = apply(world, "-f", str(folder), "--dry-run")
    assert code == 3 and "group canary: devices" in shown and "rollout canaries: assistant" in shown
    assert remora.json("groups", "list") == [] and remora.json("rollout", "list") == []
    code, made = apply(world, "-f", str(folder))
    assert (code, made) == (3, shown)
    assert apply(world, "-f", str(folder)) == (0, "nothing to change\n")
    (rollout,) = remora.json("rollout", "list")
    assert (rollout["state"], rollout["selector"]) == ("AWAITING_APPROVAL", "group=canary")
    assert remora.json("devices", "show", other.device_id)["pin"] == "on show (by operator)"
    (spec,) = [r["spec"] for r in remora.json("rollout", "list")]
    assert spec["gates"][0]["check"] == "p95(ttft_s) < 0.8"
    assert (spec["stratify"], spec["windows"]) == (["site"], ["02:00-05:00"])
    assert (spec["download_bytes_per_s"], spec["not_before_unix_s"]) == (500 << 10, 1777593600.0)
    (folder / "more.yaml").write_text("pins: {" + other.device_id + ": null}")
    with pytest.raises(RemoraError, match="is in another file too"):
        apply(world, "-f", str(folder))
    code, shown = apply(world, "-f", str(folder / "more.yaml"))
    assert code == 3 and "not pinned" in shown


def test_a_file_that_names_what_is_not_there_changes_nothing_at_all(world, tmp_path):
    device, _ = online(world, 2)
    publish_first(world)
    file = tmp_path / "fleet.yaml"
    file.write_text(
        f"labels: {{{device.device_id}: {{tier: prod}}}}\n"
        "groups: {canary: {selector: tier=prod}}\n"
        "releases: {assistant: {bundle: tiny@99}}\n"
    )
    with pytest.raises(RemoraError, match="no bundle tiny@99"):
        apply(world, "-f", str(file))
    assert Remora(world).json("groups", "list") == []
    assert "tier" not in Remora(world).json("devices", "show", device.device_id)["labels"]


def test_applying_reads_the_fleet_once(world, tmp_path, monkeypatch):
    device, _ = online(world, 2)
    file = tmp_path / "fleet.yaml"
    file.write_text(f"labels: {{{device.device_id}: {{tier: prod}}}}")
    read, call = [], Session.call

    def counting(self, method, request):
        read.append(type(request).__name__)
        return call(self, method, request)

    monkeypatch.setattr(Session, "call", counting)
    assert apply(world, "-f", str(file))[0] == 3
    assert [r for r in read if r in ("ListDevicesRequest", "LabelDeviceRequest")] == [
        "ListDevicesRequest",
        "LabelDeviceRequest",
    ]


def test_a_changed_release_is_shown_as_what_differs_from_the_one_before(world, tmp_path):
    publish_first(world)
    file = tmp_path / "fleet.yaml"
    text = "releases: {assistant: {bundle: tiny@1, sampling: {temperature: %s}}}"
    file.write_text(text % 0.2)
    code, shown = apply(world, "-f", str(file))
    assert (code, shown.rstrip().endswith(": new")) == (3, True)
    file.write_text(text % 0.7)
    code, shown = apply(world, "-f", str(file), "--dry-run")
    assert code == 3 and "  sampling.temperature: 0.2 -> 0.7" in shown
    assert "bundle" not in shown, "what stays is not shown"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("rolouts: {}", "unknown key 'rolouts'"),
        ("groups: {a: {}}", "either devices or a selector"),
        ("releases: {a: {bundel: x}}", "bundel"),
        ("labels: {d-none: {a: b}}", "no device d-none"),
        ("rollouts: {a: {release: nowhere}}", "no release nowhere"),
        ("rollouts: {a: {release: r, waves: ['0']}}", "rollouts.a: --wave '0'"),
        ("rollouts: {a: {release: r, not_before: soon}}", "rollouts.a: --not-before 'soon'"),
        ("rollouts: {a: {release: r, windows: ['25-26']}}", "rollouts.a: --window"),
        ("rollouts: {a: {release: r, device_bandwidth: fast}}", "rollouts.a: --device-bandwidth"),
        ("rollouts: {a: {release: r, gates: [{name: g, check: 'ttft <'}]}}", "rollouts.a: check"),
        ("- a", "a table of groups"),
    ],
)
def test_a_fleet_file_that_makes_no_sense_is_refused_by_name(world, tmp_path, text, named):
    file = tmp_path / "fleet.yaml"
    file.write_text(text)
    with pytest.raises(RemoraError, match=named):
        apply(world, "-f", str(file))


def offered(world, *words: str) -> list[str]:
    """What bash is told behind Tab."""
    typed = ["remora", *Remora(world)._globals, *words]
    environment = {
        "_REMORA_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(typed),
        "COMP_CWORD": str(len(typed) - (words[-1] != "")),
    }
    return CliRunner().invoke(app, [], prog_name="remora", env=environment).stdout.split()


def test_ids_and_names_are_completed(world, remora):
    first, second = online(world, 2)
    remora("groups", "create", "canary", "--device", first.device_id)
    assert offered(world, "groups", "show", "can") == ["canary"]
    assert set(offered(world, "devices", "show", "bench-")) >= {first.device_id, second.device_id}
    assert offered(world, "rollout", "status", "r") == []


def test_completion_without_a_controller_offers_nothing(world):
    port = world.ports.fleet
    world.ports = type(world.ports)(1, 1, 1)
    assert offered(world, "groups", "show", "x") == []
    world.ports = type(world.ports)(port, 1, 1)
