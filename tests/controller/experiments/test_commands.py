"""`remora experiments` and releases with experiments, against a real controller."""

from __future__ import annotations

import json
import textwrap
import time
from pathlib import Path

import pytest

from remora_contract.errors import Forbidden, NotFound, Refused, RemoraError, RequestInvalid
from remora_contract.release import Release
from remora_contract.strict import loads
from remora_controller.experiments.overview import labels_of
from remora_controller.experiments.rules import check_rules
from remora_controller.operator_cli.release_document import read_release_file
from remora_controller.pki import OperatorRole
from remora_protos.control.v1 import control_pb2 as cp
from remora_protos.operator.v1 import operator_pb2 as op
from tests.controller import artifacts
from tests.controller.harness import WAIT_S, fleet
from tests.controller.operating import online, refused
from tests.controller.test_cli import Remora, apply
from tests.controller.test_governance import acting

FILE = """
name: assistant
bundle: tiny
adapters: {sql: sql@1, sql-2: sql@2}
experiments:
  sql:
    salt: spring
    arms:
      control: {adapter: sql, percent: %d}
      candidate: {adapter: sql-2, percent: %d}
    promote: {errors: candidate.failures / candidate.requests < 0.01}
    min_requests: 100
"""


@pytest.fixture
def remora(world):
    artifacts.bundle(world.home.repository)
    for revision in ("1", "2"):
        artifacts.adapter(world.home.repository, "sql", revision)
    return Remora(world)


def create(remora: Remora, tmp_path, text: str = FILE % (90, 10)) -> str:
    file = tmp_path / "release.yaml"
    file.write_text(text)
    return remora.json("releases", "create", "--file", str(file))["release_id"]


def roll_out(world, remora: Remora, release: str, devices) -> None:
    started = remora.json("rollout", "start", release, "--soak", "0")
    world.drive(started["rollout_id"], devices, "COMPLETED")


def document(remora: Remora, release: str) -> Release:
    shown = json.loads(remora("releases", "show", release))["release"]
    return loads(Release, json.dumps(shown), release)


def tell(remora: Remora, device, release: str, arm: str, **counts: float) -> None:
    """As an agent tells what an arm counted."""
    label = labels_of(document(remora, release))["sql"][arm]
    metrics = [
        cp.Metric(name=f"experiment_{n}_total.{label}", value=v, at_unix_s=time.time())
        for n, v in counts.items()
    ]
    device.sync(metrics=metrics)


def test_a_release_file_declares_experiments_and_releases_show_and_compare_them(
    world, remora, tmp_path
):
    first = create(remora, tmp_path)
    shown = json.loads(remora("releases", "show", first))["release"]["experiments"]
    assert [(a["name"], a["percent"]) for a in shown[0]["arms"]] == [
        ("control", 90),
        ("candidate", 10),
    ]
    second = create(remora, tmp_path, FILE % (50, 50))
    listed = remora.json("releases", "diff", first, second)
    found = {d["path"]: (d["before"], d["after"]) for d in listed}
    assert found == {
        "experiments.sql.arms.control.percent": ("90.0", "50.0"),
        "experiments.sql.arms.candidate.percent": ("10.0", "50.0"),
    }


def test_a_fleet_file_takes_them_and_the_same_file_again_changes_nothing(world, remora, tmp_path):
    release = textwrap.indent((FILE % (90, 10)).replace("name: assistant\n", ""), "    ")
    file = tmp_path / "fleet.yaml"
    file.write_text(f"releases:\n  assistant:{release}")
    code, shown = apply(world, "-f", str(file))
    assert code == 3 and shown.startswith("release assistant-") and shown.endswith(": new\n")
    assert apply(world, "-f", str(file)) == (0, "nothing to change\n")
    assert document(remora, "assistant").experiments[0].arm("candidate").percent == 10
    file.write_text(file.read_text().replace("90", "91"))
    with pytest.raises(RemoraError, match=r"releases.assistant: .*add up to 101"):
        apply(world, "-f", str(file))


def test_the_page_about_them_begins_with_a_release_that_can_be_made():
    page = (Path(__file__).parents[3] / "docs" / "experiments.md").read_text().splitlines()
    start = next(i for i, line in enumerate(page) if line.startswith("    name: assistant"))
    example = textwrap.dedent("\n".join(page[start : page.index("", start)]))
    release = read_release_file(example.encode(), "docs/experiments.md")
    (experiment,) = release.experiments
    check_rules([experiment])
    assert (experiment.promote_when, experiment.min_requests) == ("pass", 500)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("percent: 10", "percent: 20"), "percents add up to 110"),
        (("adapter: sql-2,", "adapter: sql-3,"), "arm candidate: the release has no adapter"),
        (("candidate.failures", "winner.failures"), "rule errors: no arm 'winner'"),
        (("candidate.failures", "candidate.faults"), "rule errors: candidate counts no 'faults'"),
        (("min_requests: 100", "min_request: 100"), "unknown key .*min_request"),
        (("min_requests: 100", "promote_when: fail"), "promote_when.*one of pass"),
        (
            ("salt: spring", "shadow: {incumbent: control, candidate: nobody, percent: 5}"),
            "shadow names no arm 'nobody'",
        ),
    ],
)
def test_experiments_that_no_device_could_run_are_refused_by_name(
    world, remora, tmp_path, change, why
):
    with pytest.raises(RemoraError, match=why):
        create(remora, tmp_path, (FILE % (90, 10)).replace(*change))


def test_other_shares_ship_nothing_and_build_nothing(world, remora, tmp_path):
    devices = online(world, 2)
    first = create(remora, tmp_path)
    for device in devices:
        device.bundle_digest = document(remora, first).bundle
    roll_out(world, remora, first, devices)
    listed = [
        cp.ServingAdapter(name=a.name, revision=a.revision, digest=a.digest)
        for a in document(remora, first).adapters
    ]
    for device in devices:  # they report what they serve
        request = device.request()
        request.reported.adapters.extend(listed)
        device.fleet.Sync(request, timeout=WAIT_S)
    plan = remora.json("plan", create(remora, tmp_path, FILE % (50, 50)))
    assert [(d["ship_bytes"], d["builds_engine"]) for d in plan["devices"]] == [(0, False)] * 2


def test_arms_are_summed_over_devices(world, remora, tmp_path):
    one, _ = devices = online(world, 2)
    first = create(remora, tmp_path)
    roll_out(world, remora, first, devices)
    assert remora.json("experiments", "list")[0]["arms"][1]["counts"] == {}
    for device in devices:
        tell(
            remora, device, first, "candidate", requests=60, failures=10, tokens=600,
            first_token_seconds=5, answer_seconds=25, unkeyed=3,
        )  # fmt: skip
    tell(remora, one, first, "control", requests=900)
    (found,) = remora.json("experiments", "show", "sql")
    control, candidate = found["arms"]
    assert (control["devices"], candidate["devices"]) == (1, 2)
    assert candidate["counts"]["requests"] == 120 and candidate["counts"]["unkeyed"] == 6
    assert candidate["statistics"] == {
        "failure_fraction": 20 / 120,
        "mean_first_token_s": 0.1,
        "mean_answer_s": 0.5,
    }
    assert control["statistics"]["failure_fraction"] == 0
    assert (found["incumbent"], found["candidate"], found["verdict"]) == (
        "control",
        "candidate",
        "FAIL",
    )
    shown = remora("experiments", "show", "sql")
    assert (
        "FAIL" in shown and "candidate.requests = 120" in shown and candidate["identity"] in shown
    )
    assert "candidate" in remora("experiments")
    assert (
        remora.json("experiments", "list", "-l", f"id={one.device_id}")[0]["arms"][1]["counts"][
            "requests"
        ]
        == 60
    )


def test_other_shares_count_on_and_other_bytes_or_another_salt_begin_anew(world, remora, tmp_path):
    devices = online(world, 2)
    first = create(remora, tmp_path)
    roll_out(world, remora, first, devices)
    tell(remora, devices[0], first, "candidate", requests=120)
    again = create(remora, tmp_path, FILE % (50, 50))
    roll_out(world, remora, again, devices)
    (shares,) = remora.json("experiments", "show", "sql")
    assert shares["arms"][1]["percent"] == 50
    assert shares["arms"][1]["counts"]["requests"] == 120, "other shares count on"
    other_bytes = create(remora, tmp_path, (FILE % (50, 50)).replace("spring", "autumn"))
    roll_out(world, remora, other_bytes, devices)
    (anew,) = remora.json("experiments", "show", "sql")
    assert [a["counts"] for a in anew["arms"]] == [{}, {}]
    every = remora.json("experiments", "list", "--all")
    assert [e["release_ids"] for e in every] == [[other_bytes], [again, first]]
    with pytest.raises(NotFound, match="--all"):
        remora("experiments", "show", "poems")


def test_counts_outlive_a_restart_of_the_controller(home, tmp_path):
    with fleet(home) as world:
        artifacts.bundle(home.repository)
        for revision in ("1", "2"):
            artifacts.adapter(home.repository, "sql", revision)
        remora = Remora(world)
        (device,) = online(world, 1)
        release = create(remora, tmp_path)
        roll_out(world, remora, release, [device])
        tell(remora, device, release, "candidate", requests=60)
        tell(remora, device, release, "candidate", requests=20)  # it died and forgot
        before = remora.json("experiments", "show", "sql")
    assert before[0]["arms"][1]["counts"] == {"requests": 60}
    with fleet(home) as world:
        assert Remora(world).json("experiments", "show", "sql") == before


def test_a_promotion_waits_for_its_rules_and_then_is_a_rollout(world, remora, tmp_path):
    devices = online(world, 2)
    first = create(remora, tmp_path)
    roll_out(world, remora, first, devices)
    tell(remora, devices[0], first, "candidate", requests=99)
    with pytest.raises(Refused, match="errors is INCONCLUSIVE: candidate has 99 of 100 requests"):
        remora("experiments", "promote", "sql")
    tell(remora, devices[1], first, "candidate", requests=1, failures=1)
    with pytest.raises(Refused, match=r"errors is FAIL: .* = 0.01; wait, or .*--force --reason"):
        remora("experiments", "promote", "sql")
    tell(remora, devices[1], first, "candidate", requests=51, failures=1)
    dry = remora.json("experiments", "promote", "sql", "--dry-run", "--wave", "1")
    assert (dry["refusal"], dry["rules"][0]["verdict"]) == ("", "PASS")
    assert dry["plan"]["waves"] == ["wave 1: 1 devices", "wave 2: 1 devices"]
    assert len(remora.json("releases", "list")) == 1, "a dry run changes nothing"
    shown = remora("experiments", "promote", "sql", "--dry-run")
    assert "sql becomes its arm candidate" in shown and "adapters.sql.digest" in shown
    made = remora.json("experiments", "promote", "sql", "--wave", "1", "--soak", "0")
    assert (made["release_id"], made["arm"]) == (dry["release_id"], "candidate")
    assert (made["rollout"]["waves"], made["rollout"]["state"]) == (2, "RUNNING")
    world.drive(made["rollout"]["rollout_id"], devices, "COMPLETED")
    after = document(remora, made["release_id"])
    assert after.experiments is None
    digests = {a.name: a.digest for a in after.adapters}
    assert digests["sql"] == document(remora, first).adapters[1].digest
    assert remora.json("experiments", "list") == []
    (event,) = [e for e in remora.json("events") if e["name"] == "experiment.promoted"]
    assert (event["detail"]["by"], event["detail"]["arm"]) == ("operator", "candidate")
    assert event["detail"]["rules"][0]["numbers"]["candidate.requests"] == 150


def test_force_needs_a_reason_and_the_audit_log_has_it(world, remora, tmp_path):
    devices = online(world, 1)
    roll_out(world, remora, create(remora, tmp_path), devices)
    with pytest.raises(RequestInvalid, match="--force needs a --reason"):
        remora("experiments", "promote", "sql", "--force")
    made = remora.json(
        "experiments", "promote", "sql", "--force", "--reason", "it was tried elsewhere",
        "--needs-approval",
    )  # fmt: skip
    assert made["rollout"]["state"] == "AWAITING_APPROVAL"
    assert "it was tried elsewhere" in remora("audit")
    (event,) = [e for e in remora.json("events") if e["name"] == "experiment.promoted"]
    assert "0 of 100 requests" in event["detail"]["forced"]
    with acting(world, OperatorRole.VIEWER) as stub:
        request = op.PromotionRequest(name="sql")
        assert isinstance(refused(stub.PromoteExperiment, request), Forbidden)
        assert stub.PlanPromotion(request, timeout=WAIT_S).refusal


def test_going_back_to_the_incumbent_takes_no_proof(world, remora, tmp_path):
    devices = online(world, 1)
    roll_out(world, remora, create(remora, tmp_path), devices)
    made = remora.json("experiments", "promote", "sql", "--arm", "control", "--soak", "0")
    world.drive(made["rollout"]["rollout_id"], devices, "COMPLETED")
    assert document(remora, made["release_id"]).experiments is None


def test_devices_that_run_different_releases_ask_which_is_meant(world, remora, tmp_path):
    one, other = online(world, 1, site="a") + online(world, 1, site="b")
    for device, site, text in ((one, "a", FILE % (90, 10)), (other, "b", FILE % (50, 50))):
        release = create(remora, tmp_path, text)
        made = remora.json("rollout", "start", release, "-l", f"site={site}", "--soak", "0")
        world.drive(made["rollout_id"], [device], "COMPLETED")
    with pytest.raises(Refused, match=r"different releases .*--from RELEASE"):
        remora("experiments", "promote", "sql")
    (found,) = remora.json("experiments", "show", "sql")
    assert (found["devices"], len(found["release_ids"])) == (2, 2)
    dry = remora.json("experiments", "promote", "sql", "-l", "site=a", "--dry-run")
    assert len(dry["plan"]["devices"]) == 1
    with pytest.raises(NotFound, match="no experiment poems"):
        remora("experiments", "promote", "poems", "-l", "site=a")
