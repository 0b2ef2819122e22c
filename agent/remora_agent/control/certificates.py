"""Keys, requests and chain checks with `cryptography`. Pure except for the key's randomness.

Clients verify the name `remora-controller`, never an address (ADR 4).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from remora_contract.errors import Unauthenticated

CONTROLLER_NAME = "remora-controller"


def make_key() -> bytes:
    """A new EC P-256 private key, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def make_request(key_pem: bytes, name: str) -> bytes:
    """A certificate request, PEM. `name` is a hint for people: the controller names devices."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64] or "device")])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return request.sign(_private_key(key_pem), hashes.SHA256()).public_bytes(
        serialization.Encoding.PEM
    )


def trusted_ca(chain: Sequence[x509.Certificate], ca_sha256: str, now: datetime) -> bytes:
    """The CA of a presented chain as PEM, once the chain holds: the CA has the hash the join token
    carries and signed the leaf, and the leaf is a controller's. Raises Unauthenticated."""
    ca = next((c for c in chain if _der_hash(c) == ca_sha256), None)
    if ca is None or not chain:
        raise Unauthenticated(
            "the server did not present the CA that the token names: wrong address, or somebody "
            "answers in the controller's place; the token was not sent"
        )
    check_controller(chain[0], ca, now)
    return ca.public_bytes(serialization.Encoding.PEM)


def check_controller(leaf: x509.Certificate, ca: x509.Certificate, now: datetime) -> None:
    """Raises Unauthenticated unless the leaf is one of this CA's controllers, and valid now."""
    check_issued(leaf, ca, now)
    if CONTROLLER_NAME not in _dns_names(leaf):
        raise Unauthenticated(f"the server's certificate is not one of a {CONTROLLER_NAME}")


def check_issued(leaf: x509.Certificate, ca: x509.Certificate, now: datetime) -> None:
    """Raises Unauthenticated unless `ca` signed `leaf` and both are valid now."""
    try:
        leaf.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature) as e:
        raise Unauthenticated("the certificate was not signed by the expected CA") from e
    for certificate in (leaf, ca):
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            raise Unauthenticated(
                f"certificate {certificate.subject.rfc4514_string()} is valid from "
                f"{certificate.not_valid_before_utc} to {certificate.not_valid_after_utc}, and now "
                f"is {now}: check this device's clock"
            )


def check_own(certificate_pem: bytes, key_pem: bytes, ca_pem: bytes, now: datetime) -> None:
    """A certificate we were given is for our key and from our CA. Raises Unauthenticated."""
    leaf, ca = load_certificate(certificate_pem), load_certificate(ca_pem)
    if leaf.public_key() != _private_key(key_pem).public_key():
        raise Unauthenticated("the controller answered with a certificate for another key")
    check_issued(leaf, ca, now)


def load_certificate(pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as e:
        raise Unauthenticated(f"not a PEM certificate: {e}") from e


def renew_at(certificate_pem: bytes) -> datetime:
    """Two thirds of its life."""
    certificate = load_certificate(certificate_pem)
    return certificate.not_valid_before_utc + lifetime(certificate) * 2 / 3


def expires_at(certificate_pem: bytes) -> datetime:
    return load_certificate(certificate_pem).not_valid_after_utc


def lifetime(certificate: x509.Certificate) -> timedelta:
    return certificate.not_valid_after_utc - certificate.not_valid_before_utc


def _private_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Unauthenticated("the device's key is no EC key; join again with --force")
    return key


def _dns_names(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return names.value.get_values_for_type(x509.DNSName)


def _der_hash(certificate: x509.Certificate) -> str:
    der = certificate.public_bytes(serialization.Encoding.DER)
    return hashlib.sha256(der).hexdigest()
