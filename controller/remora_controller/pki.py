"""The controller's certificate authority: EC P-256, one CA, three roles.

    O=remora, OU=device|operator|controller, CN=<id>, and of operators T=<what they may do>

The server certificate carries the SAN `remora-controller` besides its addresses; clients verify
that name, so a moved controller keeps its identity. Owns keys and certificates as PEM bytes; knows
no files, no sockets and no clock.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from enum import Enum

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from remora_contract.errors import RequestInvalid, Unauthenticated

SERVER_NAME = "remora-controller"
ORGANIZATION = "remora"
CA_LIFE = timedelta(days=3650)
SERVER_LIFE = timedelta(days=3650)
OPERATOR_LIFE = timedelta(days=365)
DEVICE_LIFE = timedelta(days=30)
# How long after its end a device's certificate still proves who it was.
RENEWABLE_FOR = timedelta(days=180)
# Boards without a clock battery wake up in the past.
BACKDATE = timedelta(hours=24)
MAX_CSR_BYTES = 16 << 10
MAX_CERTIFICATE_BYTES = 16 << 10


class Role(Enum):
    DEVICE = "device"
    OPERATOR = "operator"
    CONTROLLER = "controller"


class OperatorRole(Enum):
    """What an operator may do; services/access.py has the table."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    APPROVER = "approver"
    ADMIN = "admin"


@dataclass(frozen=True)
class Identity:
    """Who a verified client certificate says is calling. `operator_role` is None of others than
    operators."""

    role: Role
    name: str
    key_fingerprint: str
    operator_role: OperatorRole | None = None


@dataclass(frozen=True)
class KeyPair:
    """PEM: a certificate and its private key."""

    certificate: bytes
    key: bytes


class Authority:
    """Signs certificates. The private key stays inside."""

    def __init__(self, pair: KeyPair) -> None:
        self._certificate = x509.load_pem_x509_certificate(pair.certificate)
        key = serialization.load_pem_private_key(pair.key, password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise RequestInvalid("the CA's key is no elliptic-curve key; run init again")
        self._key = key

    @property
    def pem(self) -> bytes:
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def der_sha256(self) -> str:
        """What join tokens carry: hex."""
        return self._certificate.fingerprint(hashes.SHA256()).hex()

    def issue(
        self,
        csr_pem: bytes,
        role: Role,
        name: str,
        now: datetime,
        operator_role: OperatorRole | None = None,
    ) -> bytes:
        """A client certificate for a checked request. Raises RequestInvalid."""
        life = DEVICE_LIFE if role is Role.DEVICE else OPERATOR_LIFE
        subject = _subject(role, name, operator_role)
        builder = self._builder(load_request(csr_pem).public_key(), subject, now, life)
        builder = builder.add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        return self._sign(builder)

    def expired_device(self, certificate_pem: bytes, now: datetime) -> Identity:
        """Whom a device certificate of this CA named, though it may have expired. Raises
        Unauthenticated, RequestInvalid."""
        if len(certificate_pem) > MAX_CERTIFICATE_BYTES:
            raise RequestInvalid(f"a certificate has at most {MAX_CERTIFICATE_BYTES} bytes")
        try:
            certificate = x509.load_pem_x509_certificate(certificate_pem)
            certificate.verify_directly_issued_by(self._certificate)
        except (ValueError, TypeError, InvalidSignature) as e:
            raise Unauthenticated("not a certificate of this fleet; join again") from e
        identity = identity_of(certificate_pem)
        if identity.role is not Role.DEVICE:
            raise Unauthenticated(f"only devices renew what has expired, not {identity.role.value}")
        if now > certificate.not_valid_after_utc + RENEWABLE_FOR:
            raise Unauthenticated(
                f"the certificate of {identity.name} expired more than {RENEWABLE_FOR.days} days "
                "ago; join again with a new token"
            )
        return identity

    def issue_operator(self, name: str, operator_role: OperatorRole, now: datetime) -> KeyPair:
        """Key and certificate for a person or a script."""
        key = _new_key()
        certificate = self.issue(request_for(key), Role.OPERATOR, name, now, operator_role)
        return KeyPair(certificate, _key_pem(key))

    def issue_server(self, addresses: Sequence[str], now: datetime) -> KeyPair:
        """The controller's own, for `addresses` (names or IPs) and SERVER_NAME."""
        key = _new_key()
        subject = _subject(Role.CONTROLLER, SERVER_NAME)
        builder = self._builder(key.public_key(), subject, now, SERVER_LIFE)
        names = [_general_name(a) for a in dict.fromkeys((SERVER_NAME, *addresses))]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
        )
        return KeyPair(self._sign(builder), _key_pem(key))

    def _builder(
        self,
        public_key: ec.EllipticCurvePublicKey,
        subject: x509.Name,
        now: datetime,
        life: timedelta,
    ) -> x509.CertificateBuilder:
        builder = _unsigned(subject, self._certificate.subject, public_key, now, life)
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(identifier, critical=False)
        )

    def _sign(self, builder: x509.CertificateBuilder) -> bytes:
        certificate = builder.sign(self._key, hashes.SHA256())
        return certificate.public_bytes(serialization.Encoding.PEM)


def create_authority(now: datetime) -> KeyPair:
    """A new CA."""
    key = _new_key()
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANIZATION),
            x509.NameAttribute(NameOID.COMMON_NAME, "remora fleet CA"),
        ]
    )
    builder = _unsigned(name, name, key.public_key(), now, CA_LIFE)
    builder = (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    certificate = builder.sign(key, hashes.SHA256())
    return KeyPair(certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key))


@dataclass(frozen=True)
class CheckedRequest:
    csr: x509.CertificateSigningRequest

    def public_key(self) -> ec.EllipticCurvePublicKey:
        key = self.csr.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise RequestInvalid(f"a certificate request needs a P-256 key, not {type(key)}")
        return key

    @property
    def key_fingerprint(self) -> str:
        return fingerprint(self.public_key())


def load_request(csr_pem: bytes) -> CheckedRequest:
    """Size, form, key type and proof of possession. Raises RequestInvalid.

    Everything else a request says (its subject, its extensions) is ignored: the controller
    decides what a certificate says."""
    if len(csr_pem) > MAX_CSR_BYTES:
        raise RequestInvalid(f"a certificate request has at most {MAX_CSR_BYTES} bytes")
    try:
        csr = x509.load_pem_x509_csr(csr_pem)
        key, is_signed = csr.public_key(), csr.is_signature_valid
    except (ValueError, InvalidSignature, TypeError) as e:
        raise RequestInvalid(f"not a certificate request in PEM form: {e}") from e
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise RequestInvalid("the key of a certificate request must be an EC key on P-256")
    if not is_signed:
        raise RequestInvalid("the certificate request is not signed by its own key")
    return CheckedRequest(csr)


def request_for(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A PEM certificate request for a key one holds."""
    subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANIZATION)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def identity_of(certificate_pem: bytes) -> Identity:
    """Raises Unauthenticated when a certificate of our CA lacks a role or a name."""
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    units = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    roles = {r.value: r for r in Role}
    if len(units) != 1 or len(names) != 1 or units[0].value not in roles:
        raise Unauthenticated("the client certificate names no role; join or init again")
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise Unauthenticated("the client certificate's key is no EC key; join or init again")
    role = roles[str(units[0].value)]
    operator_role = _operator_role(certificate) if role is Role.OPERATOR else None
    return Identity(role, str(names[0].value), fingerprint(key), operator_role)


def _operator_role(certificate: x509.Certificate) -> OperatorRole:
    """Credentials that were made before there were roles may do everything, as they could."""
    titles = [str(t.value) for t in certificate.subject.get_attributes_for_oid(NameOID.TITLE)]
    if not titles:
        return OperatorRole.ADMIN
    roles = {r.value: r for r in OperatorRole}
    if len(titles) != 1 or titles[0] not in roles:
        raise Unauthenticated(
            f"this controller knows no operator role {titles[0][:40]!r}; make credentials with "
            "`remora-controller operator add`"
        )
    return roles[titles[0]]


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """sha256 of the public key, hex."""
    der = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    digest = hashes.Hash(hashes.SHA256())
    digest.update(der)
    return digest.finalize().hex()


def expires_at(certificate_pem: bytes) -> datetime:
    return x509.load_pem_x509_certificate(certificate_pem).not_valid_after_utc


def utc(unix_s: float) -> datetime:
    return datetime.fromtimestamp(unix_s, tz=timezone.utc)


def _unsigned(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime,
    life: timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + life)
    )


def _subject(role: Role, name: str, operator_role: OperatorRole | None = None) -> x509.Name:
    attributes = [
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANIZATION),
        x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role.value),
        x509.NameAttribute(NameOID.COMMON_NAME, name),
    ]
    if operator_role is not None:
        attributes.append(x509.NameAttribute(NameOID.TITLE, operator_role.value))
    return x509.Name(attributes)


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        return x509.DNSName(address)


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
