"""Certificates, and the directory that holds them."""

from __future__ import annotations

import stat
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from remora_contract.errors import Conflict, DocumentInvalid, NotFound, Refused, RequestInvalid
from remora_controller import home as homes
from remora_controller import pki
from remora_controller.pki import Role
from tests.controller.harness import NOW, new_key


@pytest.fixture(scope="module")
def authority():
    return pki.Authority(pki.create_authority(NOW))


def load(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


def test_a_device_certificate_says_who_it_is_and_for_how_long(authority):
    _, csr = new_key()
    pem = authority.issue(csr, Role.DEVICE, "orin-1", NOW)
    identity = pki.identity_of(pem)
    assert (identity.role, identity.name) == (Role.DEVICE, "orin-1")
    assert identity.key_fingerprint == pki.load_request(csr).key_fingerprint
    assert pki.expires_at(pem) == NOW + timedelta(days=30)
    load(pem).verify_directly_issued_by(load(authority.pem))


def test_a_device_certificate_can_neither_sign_nor_serve(authority):
    _, csr = new_key()
    extensions = load(authority.issue(csr, Role.DEVICE, "orin-1", NOW)).extensions
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    uses = list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    assert uses == [x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH]


def test_what_a_request_says_about_itself_is_ignored(authority):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [
            x509.NameAttribute(x509.NameOID.COMMON_NAME, "admin"),
            x509.NameAttribute(x509.NameOID.ORGANIZATIONAL_UNIT_NAME, "operator"),
        ]
    )
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
    csr = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    identity = pki.identity_of(authority.issue(csr, Role.DEVICE, "orin-1", NOW))
    assert (identity.role, identity.name) == (Role.DEVICE, "orin-1")


def test_the_server_certificate_carries_the_fixed_name_and_its_addresses(authority):
    pair = authority.issue_server(["controller.example", "10.0.0.7"], NOW)
    names = (
        load(pair.certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    )
    assert names.get_values_for_type(x509.DNSName) == ["remora-controller", "controller.example"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]


def rsa_request() -> bytes:
    key = rsa.generate_private_key(65537, 2048)
    return _request(key)


def other_curve_request() -> bytes:
    return _request(ec.generate_private_key(ec.SECP384R1()))


def _request(key) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def forged_request() -> bytes:
    """Somebody else's public key: the signature does not fit."""
    der = bytearray(x509.load_pem_x509_csr(new_key()[1]).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    return x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (rsa_request, "P-256"),
        (other_curve_request, "P-256"),
        (forged_request, "not signed by its own key"),
        (lambda: b"nonsense", "not a certificate request"),
        (lambda: b"x" * 100_000, "at most"),
    ],
)
def test_a_bad_request_is_refused(make, said):
    with pytest.raises(RequestInvalid, match=said):
        pki.load_request(make())


def test_init_writes_secrets_that_only_the_owner_can_read(tmp_path):
    home = homes.create(tmp_path / "c", ["localhost"], NOW)
    for path in (home.ca_key, home.server_key, home.operator / "operator.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(home.root.stat().st_mode) == 0o700
    assert pki.identity_of((home.operator / "operator.pem").read_bytes()).role is Role.OPERATOR
    found = homes.load_toml(homes.OperatorConfig, home.operator / "controller.toml")
    assert found.address == "localhost:7440"
    assert home.load_config() == homes.ControllerConfig()


def test_init_never_overwrites_a_fleet(tmp_path):
    homes.create(tmp_path, ["localhost"], NOW)
    before = (tmp_path / "ca.pem").read_bytes()
    with pytest.raises(Conflict, match="not empty"):
        homes.create(tmp_path, ["localhost"], NOW)
    assert (tmp_path / "ca.pem").read_bytes() == before


def test_a_directory_where_init_did_not_finish_is_no_controller(tmp_path):
    home = homes.create(tmp_path, ["localhost"], NOW)
    home.ca_key.unlink()
    with pytest.raises(NotFound, match="remora-controller init"):
        homes.open_home(tmp_path)


def test_an_unknown_setting_is_refused_by_name(tmp_path):
    home = homes.create(tmp_path, ["localhost"], NOW)
    home.config.write_text('listne = "0.0.0.0:1"\n')
    with pytest.raises(DocumentInvalid, match="listne"):
        home.load_config()


def test_two_controllers_never_share_a_directory(tmp_path):
    home = homes.create(tmp_path, ["localhost"], NOW)
    with home.locked(), pytest.raises(Refused, match="another controller"), home.locked():
        pass
