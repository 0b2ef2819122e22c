"""Joining: trust before secret, keys that stay private, identities that are whole or absent."""

from __future__ import annotations

import socket
import stat
from datetime import datetime, timedelta, timezone

import pytest

from remora_agent.control.certificates import check_own, load_certificate, make_key, renew_at
from remora_agent.control.identity import (
    Identity,
    load_identity,
    replace_certificate,
    store_identity,
)
from remora_agent.control.join import JoinPlan, join
from remora_contract.errors import (
    Conflict,
    InvalidInput,
    NotFound,
    Refused,
    Unauthenticated,
    Unavailable,
)
from remora_contract.join_token import JoinToken
from tests.support.fake_controller import FakeController


@pytest.fixture
def controller(tmp_path):
    made = FakeController(tmp_path / "repository").start()
    yield made
    made.stop()


@pytest.fixture
def identity_dir(tmp_path):
    return tmp_path / "state" / "identity"


def plan(controller, identity_dir, **changes):
    values = {
        "address": controller.enrolment_address,
        "token": controller.token,
        "identity_dir": identity_dir,
        "labels": {"site": "lab"},
    }
    return JoinPlan(**{**values, **changes})


def test_joining_stores_a_whole_identity(controller, identity_dir):
    identity = join(plan(controller, identity_dir))
    assert load_identity(identity_dir) == identity
    assert identity.controller == controller.fleet_address
    assert controller.joins[0].labels == {"site": "lab"}
    assert controller.joins[0].facts.cores >= 1
    check_own(
        identity.certificate_pem, identity.key_pem, identity.ca_pem, datetime.now(timezone.utc)
    )


def test_the_key_is_made_here_private_and_never_sent(controller, identity_dir):
    identity = join(plan(controller, identity_dir))
    assert stat.S_IMODE((identity_dir / "key.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE(identity_dir.stat().st_mode) == 0o700
    assert b"PRIVATE KEY" in identity.key_pem
    assert b"PRIVATE" not in controller.joins[0].SerializeToString()


def test_a_wrong_ca_hash_is_unauthenticated_and_the_secret_stays_here(controller, identity_dir):
    impostor_token = JoinToken(controller.secret, "ab" * 32)
    with pytest.raises(Unauthenticated, match="the token was not sent"):
        join(plan(controller, identity_dir, token=impostor_token))
    assert controller.joins == []
    assert not identity_dir.exists()


def test_another_service_of_the_same_ca_is_not_a_controller(tmp_path, identity_dir):
    device_like = FakeController(tmp_path / "r").start(dns_name="some-device")
    try:
        with pytest.raises(Unauthenticated, match="remora-controller"):
            join(plan(device_like, identity_dir))
        assert device_like.joins == []
    finally:
        device_like.stop()


def test_a_used_token_is_unauthenticated(controller, identity_dir):
    token = JoinToken("x" * 43, controller.ca.sha256)
    with pytest.raises(Unauthenticated, match="used or has expired"):
        join(plan(controller, identity_dir, token=token))
    assert not identity_dir.exists()


def test_joining_again_needs_force(controller, identity_dir):
    first = join(plan(controller, identity_dir))
    with pytest.raises(Conflict, match="--force"):
        join(plan(controller, identity_dir))
    second = join(plan(controller, identity_dir, force=True))
    assert second.device_id != first.device_id
    assert load_identity(identity_dir) == second
    assert [p.name for p in identity_dir.parent.iterdir()] == ["identity"]


def test_nobody_there_is_unavailable(controller, identity_dir):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.raises(Unavailable, match="7441"):
        join(plan(controller, identity_dir, address=f"127.0.0.1:{port}"))


def test_the_fleet_port_is_told_from_the_enrolment_port(controller, identity_dir):
    with pytest.raises(Unavailable, match="not the fleet port"):
        join(plan(controller, identity_dir, address=controller.fleet_address))


def test_a_server_that_never_speaks_times_out(controller, identity_dir):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        address = f"127.0.0.1:{s.getsockname()[1]}"
        with pytest.raises(Unavailable, match="timed out"):
            join(plan(controller, identity_dir, address=address, timeout_s=0.3))


@pytest.mark.parametrize("address", ["controller", "::1:7441", "host:port", ":1"])
def test_an_address_without_a_port_is_named(controller, identity_dir, address):
    with pytest.raises(InvalidInput, match="the controller's address"):
        join(plan(controller, identity_dir, address=address))


def identity(name: str = "dev-1") -> Identity:
    return Identity(name, "h:1", "h:2", b"key", b"certificate", b"ca")


def test_without_an_identity_the_error_says_how_to_join(identity_dir):
    with pytest.raises(NotFound, match="remora-agent join"):
        load_identity(identity_dir)


@pytest.mark.parametrize("missing", ["key.pem", "cert.pem", "ca.pem", "device.json"])
def test_an_incomplete_identity_is_refused_by_file(identity_dir, missing):
    store_identity(identity_dir, identity())
    (identity_dir / missing).unlink()
    with pytest.raises(Refused, match=missing):
        load_identity(identity_dir)


def test_power_cut_between_the_renames_leaves_the_new_identity(identity_dir):
    store_identity(identity_dir, identity("old"))
    store_identity(identity_dir.with_name("identity.new"), identity("new"))
    identity_dir.rename(identity_dir.with_name("identity.old"))
    assert load_identity(identity_dir).device_id == "new"


def test_power_cut_while_writing_the_new_identity_leaves_the_old_one(identity_dir):
    store_identity(identity_dir, identity("old"))
    half = identity_dir.with_name("identity.new")
    half.mkdir()
    (half / "key.pem").write_bytes(b"k")
    assert load_identity(identity_dir).device_id == "old"
    store_identity(identity_dir, identity("new"))
    assert load_identity(identity_dir).device_id == "new"


def test_a_renewed_certificate_replaces_only_the_certificate(identity_dir):
    store_identity(identity_dir, identity())
    replace_certificate(identity_dir, b"fresh", b"ca")
    loaded = load_identity(identity_dir)
    assert (loaded.key_pem, loaded.certificate_pem) == (b"key", b"fresh")
    assert stat.S_IMODE((identity_dir / "cert.pem").stat().st_mode) == 0o600


def test_renewal_is_due_at_two_thirds_of_the_life(controller, identity_dir):
    made = join(plan(controller, identity_dir))
    certificate = load_certificate(made.certificate_pem)
    at = renew_at(made.certificate_pem)
    assert at - certificate.not_valid_before_utc == timedelta(days=20)


def test_a_certificate_for_another_key_is_not_accepted(controller, identity_dir):
    made = join(plan(controller, identity_dir))
    with pytest.raises(Unauthenticated, match="another key"):
        check_own(made.certificate_pem, make_key(), made.ca_pem, datetime.now(timezone.utc))


def test_an_expired_certificate_says_to_check_the_clock(controller, identity_dir):
    made = join(plan(controller, identity_dir))
    later = datetime.now(timezone.utc) + timedelta(days=60)
    with pytest.raises(Unauthenticated, match="clock"):
        check_own(made.certificate_pem, made.key_pem, made.ca_pem, later)
