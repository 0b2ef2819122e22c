"""Roles, approvals, the audit log, groups, pins and quarantine, through the controller's ports."""

from __future__ import annotations

import sqlite3
from contextlib import contextmanager
from datetime import datetime, timezone

import grpc
import pytest

from remora_contract import errors
from remora_controller import home as homes
from remora_controller import pki
from remora_controller.pki import OperatorRole
from remora_controller.services.access import PERMISSIONS
from remora_protos.operator.v1 import operator_pb2 as op
from remora_protos.operator.v1 import operator_pb2_grpc as op_grpc
from tests.controller.harness import OPTIONS, WAIT_S, fleet, make_home, new_key, wait_for
from tests.controller.operating import create_release, online, refused, start

CALLS = op.DESCRIPTOR.services_by_name["Operator"].methods


@contextmanager
def acting(world, role: OperatorRole, name: str = "alice"):
    """A stub with credentials of that role, made as `operator add` makes them."""
    out = world.home.root / f"credentials-{name}-{role.value}"
    now = datetime.now(timezone.utc)
    if not out.exists():
        homes.write_operator(world.home.authority(), out, name, role, "127.0.0.1:1", now)
    parts = ((out / n).read_bytes() for n in ("ca.pem", "operator.key", "operator.pem"))
    credentials = grpc.ssl_channel_credentials(*parts)
    address = f"127.0.0.1:{world.ports.fleet}"
    with grpc.secure_channel(
        address, credentials, [*OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    ) as channel:
        yield op_grpc.OperatorStub(channel)


def audit(world, **request) -> op.ListAuditResponse:
    return world.operator.ListAudit(op.ListAuditRequest(**request), timeout=WAIT_S)


def test_every_call_is_in_the_table_of_permissions():
    assert {m.name for m in CALLS} == set(PERMISSIONS)


@pytest.mark.parametrize("role", list(OperatorRole))
def test_each_role_may_make_the_calls_of_the_table_and_no_other(world, role):
    with acting(world, role) as stub:
        for method in CALLS:
            request = getattr(op, method.input_type.name)()
            try:
                getattr(stub, method.name)(request, timeout=WAIT_S)
                code = grpc.StatusCode.OK
            except grpc.RpcError as e:
                code = e.code()
            may = role in PERMISSIONS[method.name].roles
            assert (code is not grpc.StatusCode.PERMISSION_DENIED) is may, method.name


def test_a_viewer_is_told_what_the_call_needs_and_the_attempt_is_written_down_once(world):
    with acting(world, OperatorRole.VIEWER) as stub:
        for _ in range(3):
            error = refused(stub.CreateJoinToken, op.CreateJoinTokenRequest())
            assert isinstance(error, errors.Forbidden)
            assert "CreateJoinToken needs admin or operator" in str(error)
        assert stub.WhoAmI(op.WhoAmIRequest(), timeout=WAIT_S).role == "viewer"
    (entry,) = audit(world).entries
    assert (entry.who, entry.role, entry.result) == ("alice", "viewer", "PERMISSION_DENIED")


def test_credentials_from_before_there_were_roles_may_do_everything(world):
    authority, now = world.home.authority(), datetime.now(timezone.utc)
    _, csr = new_key()
    old = authority.issue(csr, pki.Role.OPERATOR, "old", now)
    assert pki.identity_of(old).operator_role is OperatorRole.ADMIN


def test_revoked_credentials_count_no_more_in_a_controller_that_runs(world):
    with acting(world, OperatorRole.ADMIN, "eve") as stub:
        stub.ListDevices(op.ListDevicesRequest(), timeout=WAIT_S)
        world.controller.controller._store.revoke_operator("eve", 1.0)
        error = refused(stub.ListDevices, op.ListDevicesRequest())
        assert "revoked" in str(error)


def test_every_change_is_written_down_before_and_after(world):
    world.operator.CreateJoinToken(op.CreateJoinTokenRequest(labels={"a": "b"}), timeout=WAIT_S)
    refused(world.operator.RemoveDevice, op.RemoveDeviceRequest(device_id="nobody"))
    world.operator.ListDevices(op.ListDevicesRequest(), timeout=WAIT_S)
    found = audit(world)
    assert [(e.what, e.answers, e.result) for e in found.entries] == [
        ("CreateJoinToken", 0, ""),
        ("CreateJoinToken", 1, "OK"),
        ("RemoveDevice", 0, ""),
        ("RemoveDevice", 3, "NOT_FOUND"),
    ]
    first = found.entries[0]
    assert (
        first.where.startswith("ipv4:127.0.0.1:") and first.detail_json == '{"labels": {"a": "b"}}'
    )
    assert "no device nobody" in found.entries[3].message
    assert (found.broken, found.head.seq) == ("", 4)
    assert [e.seq for e in audit(world, after_seq=2, limit=1).entries] == [3]


@pytest.mark.parametrize(
    ("attack", "named"),
    [
        ("UPDATE audit SET who = 'mallory' WHERE seq = 2", "entry 2 is not what was written"),
        ("DELETE FROM audit WHERE seq = 2", "entries 2 to 2 are missing"),
        ("DELETE FROM audit WHERE seq > 2", "entries 3 to 4 are missing"),
    ],
)
def test_an_altered_or_shortened_log_is_noticed(world, attack, named):
    for _ in range(2):
        world.operator.CreateJoinToken(op.CreateJoinTokenRequest(), timeout=WAIT_S)
    with sqlite3.connect(world.home.database) as db:
        with pytest.raises(sqlite3.IntegrityError, match="only grows"):
            db.execute(attack)
        db.execute("DROP TRIGGER audit_is_not_changed")
        db.execute("DROP TRIGGER audit_is_not_deleted")
        db.execute(attack)
    db.close()
    assert named in audit(world).broken


def test_a_rollout_that_needs_approval_begins_when_another_person_approves(world):
    (device,) = online(world, 1)
    release = create_release(world)
    rollout_id = start(world, release, needs_approval=True)
    device.settle()
    assert world.rollout(rollout_id).state == "AWAITING_APPROVAL" and not device.running
    action = op.RolloutActionRequest(rollout_id=rollout_id)
    assert "somebody else has to" in str(refused(world.operator.ApproveRollout, action))
    with acting(world, OperatorRole.ADMIN, "operator") as same_name:
        assert isinstance(refused(same_name.ApproveRollout, action), errors.Forbidden)
    with acting(world, OperatorRole.APPROVER) as stub:
        assert stub.ApproveRollout(action, timeout=WAIT_S).approved_by == "alice"
        assert isinstance(refused(stub.ApproveRollout, action), errors.Refused)
    done = world.drive(rollout_id, [device], "COMPLETED")
    assert device.running == release and done.approved_by == "alice"
    request = op.RolloutHistoryRequest(rollout_id=rollout_id)
    events = world.operator.RolloutHistory(request, timeout=WAIT_S).events
    assert [e.name for e in events] == ["rollout.started", "rollout.approve", "rollout.state"]


def test_abort_wins_over_an_approval_to_come(world):
    online(world, 1)
    rollout_id = start(world, create_release(world), needs_approval=True)
    world.operator.AbortRollout(op.AbortRolloutRequest(rollout_id=rollout_id), timeout=WAIT_S)
    with acting(world, OperatorRole.APPROVER) as stub:
        action = op.RolloutActionRequest(rollout_id=rollout_id)
        assert isinstance(refused(stub.ApproveRollout, action), errors.Refused)
    wait_for("it ends", lambda: world.rollout(rollout_id).state == "ABORTED")


def test_a_fleet_can_want_every_rollout_approved(tmp_path):
    with fleet(make_home(tmp_path / "controller"), rollouts_need_approval=True) as world:
        online(world, 1)
        rollout_id = start(world, create_release(world))
        assert world.rollout(rollout_id).state == "AWAITING_APPROVAL"


def save(world, name: str, **more):
    return world.operator.SaveGroup(op.SaveGroupRequest(name=name, **more), timeout=WAIT_S)


def test_a_rollout_reaches_the_devices_of_a_group(world):
    first, second = online(world, 2)
    release = create_release(world)
    assert save(world, "canary", device_ids=[first.device_id]).matching == 1
    world.drive(start(world, release, selector="group=canary"), [first, second], "COMPLETED")
    assert (first.running, second.running) == (release, "")
    save(world, "canary", device_ids=[second.device_id], replace=True)
    wait_for("whoever joins the group follows", lambda: second.settle() or second.running)


def test_a_group_in_use_is_not_deleted(world):
    online(world, 1, site="x")
    save(world, "all", selector="site=x")
    save(world, "most", selector="group=all")
    rollout_id = start(world, create_release(world), selector="group=most", needs_approval=True)
    delete = world.operator.DeleteGroup
    assert "rollout r-" in str(refused(delete, op.DeleteGroupRequest(name="most")))
    assert "group most" in str(refused(delete, op.DeleteGroupRequest(name="all")))
    assert isinstance(
        refused(world.operator.SaveGroup, op.SaveGroupRequest(name="all")), errors.Conflict
    )
    world.operator.AbortRollout(op.AbortRolloutRequest(rollout_id=rollout_id), timeout=WAIT_S)
    wait_for("it ends", lambda: world.rollout(rollout_id).state == "ABORTED")
    delete(op.DeleteGroupRequest(name="most"), timeout=WAIT_S)
    found = world.operator.ListGroups(op.ListGroupsRequest(), timeout=WAIT_S).groups
    assert [g.name for g in found] == ["all"]


def test_a_pinned_device_keeps_its_release_and_the_plan_says_so(world):
    pinned, free = online(world, 2)
    release = create_release(world)
    request = op.PinDeviceRequest(device_id=pinned.device_id, reason="on show")
    assert world.operator.PinDevice(request, timeout=WAIT_S).pin == "on show (by operator)"
    plan = world.operator.Plan(op.PlanRequest(release=release), timeout=WAIT_S)
    (only,) = [d for d in plan.devices if d.device_id == pinned.device_id]
    assert [r.code for r in only.refusals] == ["pinned"]
    world.drive(start(world, release), [pinned, free], "COMPLETED")
    assert (pinned.running, free.running) == ("", release)
    unpin = op.PinDeviceRequest(device_id=pinned.device_id, unpin=True)
    world.operator.PinDevice(unpin, timeout=WAIT_S)
    wait_for("it catches up", lambda: pinned.settle() or pinned.running == release)


def test_a_device_that_is_changing_is_not_pinned(world):
    (device,) = online(world, 1)
    start(world, create_release(world))
    wait_for("it is assigned", lambda: device.sync() and device.phase == "ASSIGNED")
    error = refused(world.operator.PinDevice, op.PinDeviceRequest(device_id=device.device_id))
    assert "pin it when it has settled" in str(error)


def test_an_operators_quarantine_is_lifted_and_a_clones_is_not(world):
    (device,) = online(world, 1)
    ask = world.operator.QuarantineDevice
    held = op.QuarantineDeviceRequest(device_id=device.device_id, reason="smells burnt")
    assert ask(held, timeout=WAIT_S).status == "quarantined"
    assert "quarantined by operator: smells burnt" in str(
        refused(device.fleet.Sync, device.request())
    )
    lift = op.QuarantineDeviceRequest(device_id=device.device_id, lift=True)
    assert ask(lift, timeout=WAIT_S).status == "online"
    device.sync()
    device.seq = 0
    assert isinstance(refused(device.fleet.Sync, device.request()), errors.Refused)
    assert "used by two machines" in str(refused(ask, lift))
