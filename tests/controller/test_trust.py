"""Who may do what: tokens, roles, removal, clones, certificates."""

from __future__ import annotations

import time
from datetime import datetime, timezone

import grpc
import pytest

from remora_contract import errors
from remora_contract.join_token import JoinToken
from remora_contract.rpc import from_rpc_error
from remora_controller import pki
from remora_protos.control.v1 import control_pb2 as cp
from remora_protos.control.v1 import control_pb2_grpc as cp_grpc
from remora_protos.operator.v1 import operator_pb2 as op
from remora_protos.operator.v1 import operator_pb2_grpc as op_grpc
from tests.controller.harness import (
    OPTIONS,
    WAIT_S,
    Fleet,
    SimulatedDevice,
    join,
    join_with,
    make_home,
    new_key,
    wait_for,
)


def refused(call, request) -> errors.RemoraError:
    with pytest.raises(grpc.RpcError) as e:
        answer = call(request, timeout=WAIT_S)
        if hasattr(answer, "__next__"):
            next(answer)
    return from_rpc_error(e.value)


def join_refused(world: Fleet, token: str, csr: bytes | None = None) -> errors.RemoraError:
    with pytest.raises(grpc.RpcError) as e:
        join_with(world.home, world.ports, token, csr or new_key()[1])
    return from_rpc_error(e.value)


# -- joining -------------------------------------------------------------------------------


def test_joining_gives_a_certificate_that_works_at_once(world):
    token = world.token(site="berlin")
    answer, key = join(world.home, world.ports, token, facts=cp.DeviceFacts(hostname="Orin 7!"))
    assert answer.device_id.startswith("orin-7-")
    assert answer.fleet_port == world.ports.fleet
    assert answer.ca_pem == world.home.ca.read_bytes()
    device = SimulatedDevice(answer.device_id, world.channel(answer.certificate_pem, key))
    assert device.sync().WhichOneof("answer") == "not_modified"


def test_a_token_works_once(world):
    token = world.token()
    join(world.home, world.ports, token)
    error = join_refused(world, token)
    assert isinstance(error, errors.Unauthenticated)
    assert "used before" in str(error)


def test_a_join_whose_answer_was_lost_can_be_repeated_with_the_same_key(world):
    token, (_, csr) = world.token(), new_key()
    first = join_with(world.home, world.ports, token, csr)
    assert join_with(world.home, world.ports, token, csr).device_id == first.device_id


def test_an_expired_token_lets_nobody_in(world):
    request = op.CreateJoinTokenRequest(valid_for_s=0.001)
    token = world.operator.CreateJoinToken(request, timeout=WAIT_S).token
    wait_for("it expired", lambda: "expired" in str(join_refused(world, token)))


def test_an_invented_token_lets_nobody_in_and_is_not_repeated(world):
    decoded = JoinToken.decode(world.token())
    invented = JoinToken("A" * 43, decoded.ca_sha256).encode()
    error = join_refused(world, invented)
    assert isinstance(error, errors.Unauthenticated)
    assert "A" * 43 not in str(error)


def test_a_token_of_another_fleet_is_refused(world):
    other = JoinToken(JoinToken.decode(world.token()).secret, "0" * 64).encode()
    assert "another controller" in str(join_refused(world, other))


@pytest.mark.parametrize("csr", [b"", b"not a request", b"x" * 20_000])
def test_a_bad_request_leaves_the_token_unused(world, csr):
    token = world.token()
    assert isinstance(join_refused(world, token, csr or b"?"), errors.InvalidInput)
    join(world.home, world.ports, token)


def test_the_secret_of_a_token_is_not_in_the_database(world):
    secret = JoinToken.decode(world.token()).secret
    files = list(world.home.root.glob("controller.db*"))
    assert files
    assert all(secret.encode() not in path.read_bytes() for path in files)


# -- roles ---------------------------------------------------------------------------------


def test_a_device_cannot_act_as_an_operator(world):
    operator = op_grpc.OperatorStub(world.device().channel)
    calls = [
        (operator.ListDevices, op.ListDevicesRequest()),
        (operator.CreateJoinToken, op.CreateJoinTokenRequest()),
        (operator.AbortRollout, op.AbortRolloutRequest()),
        (operator.Top, op.TopRequest()),
    ]
    for call, request in calls:
        assert isinstance(refused(call, request), errors.Forbidden)


def test_every_operator_call_refuses_a_device(world):
    operator = op_grpc.OperatorStub(world.device().channel)
    methods = op.DESCRIPTOR.services_by_name["Operator"].methods
    assert len(methods) > 10
    for method in methods:
        request = getattr(op, method.input_type.name)()
        assert isinstance(refused(getattr(operator, method.name), request), errors.Forbidden)


def test_an_operator_cannot_act_as_a_device(world):
    channel = world._channels[0]
    fleet_stub, artifacts = cp_grpc.FleetStub(channel), cp_grpc.ArtifactsStub(channel)
    calls = [
        (fleet_stub.Sync, cp.SyncRequest(boot_id="b", seq=1)),
        (fleet_stub.Watch, cp.WatchRequest()),
        (fleet_stub.Renew, cp.RenewRequest()),
        (artifacts.GetManifest, cp.GetManifestRequest()),
        (artifacts.Fetch, cp.FetchRequest()),
    ]
    for call, request in calls:
        assert isinstance(refused(call, request), errors.Forbidden)


def test_without_a_client_certificate_the_fleet_port_does_not_talk(world):
    credentials = grpc.ssl_channel_credentials(world.home.ca.read_bytes())
    with grpc.secure_channel(f"127.0.0.1:{world.ports.fleet}", credentials, OPTIONS) as channel:
        stub = op_grpc.OperatorStub(channel)
        assert isinstance(refused(stub.ListDevices, op.ListDevicesRequest()), errors.Unavailable)


def test_a_certificate_of_another_authority_is_worth_nothing(world):
    now = datetime.now(timezone.utc)
    pair = pki.Authority(pki.create_authority(now)).issue_operator(
        "intruder", pki.OperatorRole.ADMIN, now
    )
    stub = op_grpc.OperatorStub(world.channel(pair.certificate, pair.key))
    assert isinstance(refused(stub.ListDevices, op.ListDevicesRequest()), errors.Unavailable)


def test_an_expired_certificate_is_worth_nothing(world):
    long_ago = datetime(2020, 1, 1, tzinfo=timezone.utc)
    pair = world.home.authority().issue_operator("former", pki.OperatorRole.ADMIN, long_ago)
    stub = op_grpc.OperatorStub(world.channel(pair.certificate, pair.key))
    assert isinstance(refused(stub.ListDevices, op.ListDevicesRequest()), errors.Unavailable)


def test_a_device_certificate_that_was_never_enrolled_is_forbidden(world):
    key, csr = new_key()
    now = datetime.now(timezone.utc)
    pem = world.home.authority().issue(csr, pki.Role.DEVICE, "ghost", now)
    device = SimulatedDevice("ghost", world.channel(pem, key))
    error = refused(device.fleet.Sync, device.request())
    assert isinstance(error, errors.Forbidden)
    assert "join again" in str(error)


# -- removal, renewal, clones --------------------------------------------------------------


def test_a_removed_device_is_denied_everywhere_and_its_stream_ends(world):
    device = world.device()
    device.sync()
    watch = device.fleet.Watch(cp.WatchRequest(), timeout=WAIT_S)
    wait_for("the stream is open", lambda: len(world.controller.controller._watchers) == 1)
    request = op.RemoveDeviceRequest(device_id=device.device_id)
    world.operator.RemoveDevice(request, timeout=WAIT_S)
    assert list(watch) == []
    artifacts = cp_grpc.ArtifactsStub(device.channel)
    for call, message in (
        (device.fleet.Sync, device.request()),
        (device.fleet.Watch, cp.WatchRequest()),
        (device.fleet.Renew, cp.RenewRequest()),
        (artifacts.GetManifest, cp.GetManifestRequest()),
        (artifacts.Fetch, cp.FetchRequest()),
    ):
        assert isinstance(refused(call, message), errors.Forbidden)
    assert isinstance(refused(world.operator.RemoveDevice, request), errors.NotFound)


def test_a_removed_device_that_still_calls_is_shown_until_it_is_quiet(world):
    device, other = world.device(site="berlin"), world.device(site="paris")
    for d in (device, other):
        d.sync()
    world.operator.RemoveDevice(op.RemoveDeviceRequest(device_id=device.device_id))

    def listed(selector: str = "") -> dict[str, tuple[str, str]]:
        request = op.ListDevicesRequest(selector=selector)
        found = world.operator.ListDevices(request, timeout=WAIT_S).devices
        return {d.device_id: (d.status, d.note) for d in found}

    assert set(listed()) == {other.device_id}
    refused(device.fleet.Sync, device.request())
    status, note = listed("site=berlin")[device.device_id]
    assert status == "removed"
    assert "still calls" in note
    assert set(listed("site=paris")) == {other.device_id}
    presence = world.controller.controller._presence
    assert presence.turned_away(time.time() + 3600) == {}


def test_a_certificate_is_renewed_for_its_own_key_only(world):
    answer, key = join(world.home, world.ports, world.token())
    device = SimulatedDevice(answer.device_id, world.channel(answer.certificate_pem, key))
    from cryptography.hazmat.primitives import serialization

    own = pki.request_for(serialization.load_pem_private_key(key, None))
    renewed = device.fleet.Renew(cp.RenewRequest(csr_pem=own), timeout=WAIT_S)
    again = SimulatedDevice(answer.device_id, world.channel(renewed.certificate_pem, key))
    again.sync()
    foreign = cp.RenewRequest(csr_pem=new_key()[1])
    assert isinstance(refused(device.fleet.Renew, foreign), errors.InvalidInput)


def expired_since(world, csr: bytes, device_id: str, days: float) -> bytes:
    """A device certificate that ended so long ago."""
    issued = time.time() - days * 86_400 - pki.DEVICE_LIFE.total_seconds()
    return world.home.authority().issue(csr, pki.Role.DEVICE, device_id, pki.utc(issued))


def renew_expired(world, certificate: bytes, csr: bytes) -> cp.RenewResponse:
    credentials = grpc.ssl_channel_credentials(world.home.ca.read_bytes())
    address = f"127.0.0.1:{world.ports.enrolment}"
    with grpc.secure_channel(address, credentials, OPTIONS) as channel:
        request = cp.RenewExpiredRequest(certificate_pem=certificate, csr_pem=csr)
        return cp_grpc.EnrolmentStub(channel).RenewExpired(request, timeout=WAIT_S)


def test_an_expired_certificate_opens_nothing_but_its_own_renewal(world):
    key, csr = new_key()
    answer = join_with(world.home, world.ports, world.token(), csr)
    expired = expired_since(world, csr, answer.device_id, days=10)
    late = SimulatedDevice(answer.device_id, world.channel(expired, key))
    assert isinstance(refused(late.fleet.Sync, late.request()), errors.Unavailable)
    renewed = renew_expired(world, expired, csr)
    again = SimulatedDevice(answer.device_id, world.channel(renewed.certificate_pem, key))
    again.sync()


def test_a_removed_device_does_not_come_back_through_an_expired_certificate(world):
    csr = new_key()[1]
    answer = join_with(world.home, world.ports, world.token(), csr)
    expired = expired_since(world, csr, answer.device_id, days=10)
    world.operator.RemoveDevice(op.RemoveDeviceRequest(device_id=answer.device_id))
    with pytest.raises(grpc.RpcError) as e:
        renew_expired(world, expired, csr)
    assert isinstance(from_rpc_error(e.value), errors.Forbidden)


@pytest.mark.parametrize(
    ("attack", "error"),
    [
        ("another key", errors.RequestInvalid),
        ("too long ago", errors.Unauthenticated),
        ("another fleet", errors.Unauthenticated),
        ("an operator", errors.Unauthenticated),
        ("an unknown device", errors.Forbidden),
        ("noise", errors.Unauthenticated),
        ("too large", errors.RequestInvalid),
    ],
)
def test_what_is_no_expired_certificate_of_a_device_renews_nothing(world, tmp_path, attack, error):
    csr = new_key()[1]
    device_id = join_with(world.home, world.ports, world.token(), csr).device_id
    stranger = make_home(tmp_path / "other").authority()
    long_ago = pki.utc(time.time() - 40 * 86_400)
    certificate = {
        "another key": lambda: expired_since(world, new_key()[1], device_id, 10),
        "too long ago": lambda: expired_since(world, csr, device_id, 181),
        "another fleet": lambda: stranger.issue(csr, pki.Role.DEVICE, device_id, long_ago),
        "an operator": lambda: world.home.authority().issue(
            csr, pki.Role.OPERATOR, device_id, long_ago
        ),
        "an unknown device": lambda: expired_since(world, csr, "nobody", 10),
        "noise": lambda: b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        "too large": lambda: b"x" * (pki.MAX_CERTIFICATE_BYTES + 1),
    }[attack]()
    with pytest.raises(grpc.RpcError) as e:
        renew_expired(world, certificate, csr)
    assert type(from_rpc_error(e.value)) is error


def test_one_identity_on_two_machines_is_quarantined_and_named(world):
    device = world.device()
    twin = SimulatedDevice(device.device_id, device.channel, boot_id="boot-of-the-twin")
    device.sync()
    twin.sync()
    error = refused(device.fleet.Sync, device.request())
    assert isinstance(error, errors.Refused)
    assert "two machines" in str(error)
    assert isinstance(refused(twin.fleet.Sync, twin.request()), errors.Refused)
    listed = world.operator.ListDevices(op.ListDevicesRequest(), timeout=WAIT_S).devices
    assert [d.status for d in listed] == ["quarantined"]
    events = world.operator.ListEvents(op.ListEventsRequest(), timeout=WAIT_S).events
    assert events[0].name == "device.quarantined"


def test_an_agent_that_starts_again_is_not_quarantined(world):
    device = world.device()
    for boot in ("b1", "b2", "b3"):
        device.boot_id, device.seq = boot, 0
        device.sync()
        device.sync()


def test_a_sync_without_a_boot_id_is_refused(world):
    device = world.device()
    device.boot_id = ""
    assert "boot_id" in str(refused(device.fleet.Sync, device.request()))
