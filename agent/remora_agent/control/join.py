"""Joining a fleet: trust the controller by the token's hash, then ask it for a certificate.

The order is the security: the presented CA is checked before the secret leaves this device, and
the connection that carries the secret verifies against that CA only. Owns no files (`identity`).
"""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from cryptography import x509

from remora_agent.config import check_address
from remora_agent.control.certificates import (
    CONTROLLER_NAME,
    check_own,
    load_certificate,
    make_key,
    make_request,
    trusted_ca,
)
from remora_agent.control.client import enrolment
from remora_agent.control.facts import machine_facts
from remora_agent.control.identity import Identity, store_identity
from remora_contract.errors import Conflict, InvalidInput, Unauthenticated, Unavailable
from remora_contract.join_token import JoinToken
from remora_protos.control.v1 import control_pb2 as pb

log = logging.getLogger(__name__)
_MAX_CHAIN = 8


@dataclass(frozen=True)
class JoinPlan:
    address: str  # HOST:PORT of the enrolment port
    token: JoinToken
    identity_dir: Path
    labels: Mapping[str, str]
    force: bool = False
    timeout_s: float = 15.0


def join(plan: JoinPlan) -> Identity:
    """Joins and stores the identity. Raises Conflict when joined already (unless `force`),
    Unauthenticated when the controller is not the token's, Unavailable when unreachable."""
    if plan.identity_dir.exists() and not plan.force:
        raise Conflict(
            f"{plan.identity_dir} exists: this device has joined already; use --force to replace "
            "its identity"
        )
    try:
        host, port = check_address(plan.address, "the controller's address")
    except ValueError as e:
        raise InvalidInput(str(e)) from e
    chain = presented_chain(host, port, plan.timeout_s)
    ca_pem = trusted_ca(chain, plan.token.ca_sha256, datetime.now(timezone.utc))
    key_pem = make_key()
    answer = _ask(plan, ca_pem, make_request(key_pem, socket.gethostname()))
    if load_certificate(answer.ca_pem) != load_certificate(ca_pem):
        raise Unauthenticated("the controller answered with another CA than it presented")
    check_own(answer.certificate_pem, key_pem, ca_pem, datetime.now(timezone.utc))
    address = f"[{host}]:{answer.fleet_port}" if ":" in host else f"{host}:{answer.fleet_port}"
    identity = Identity(
        answer.device_id, address, plan.address, key_pem, answer.certificate_pem, ca_pem
    )
    store_identity(plan.identity_dir, identity)
    log.info("device.joined", extra={"device_id": identity.device_id, "controller": address})
    return identity


def presented_chain(host: str, port: int, timeout_s: float) -> list[x509.Certificate]:
    """The certificates a TLS server shows, unverified: only their hashes may be believed.

    pyOpenSSL because `ssl` gives an unverified peer's chain only from Python 3.13 on. Raises
    Unavailable when nobody answers TLS there."""
    from OpenSSL import SSL

    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_verify(SSL.VERIFY_NONE)
    context.set_alpn_protos([b"h2"])
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as raw:
            _blocking_with_limit(raw, timeout_s)
            connection = SSL.Connection(context, raw)
            connection.set_tlsext_host_name(CONTROLLER_NAME.encode())
            connection.set_connect_state()
            connection.do_handshake()
            chain = connection.get_peer_cert_chain(as_cryptography=True) or []
    except (OSError, SSL.Error) as e:
        # WantReadError is how OpenSSL says that the socket's time limit passed.
        cause = "timed out" if isinstance(e, SSL.WantReadError) else e
        raise Unavailable(
            f"no TLS answer from {host}:{port} ({cause}); is this the enrolment port of a running "
            "remora-controller (7441 by default)?"
        ) from e
    return [c for c in chain if isinstance(c, x509.Certificate)][:_MAX_CHAIN]


def _blocking_with_limit(raw: socket.socket, timeout_s: float) -> None:
    """pyOpenSSL needs a blocking descriptor; the kernel keeps the time limit of each read."""
    raw.settimeout(None)
    limit = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)


def _ask(plan: JoinPlan, ca_pem: bytes, csr_pem: bytes) -> pb.JoinResponse:
    request = pb.JoinRequest(
        token=plan.token.encode(),
        csr_pem=csr_pem,
        facts=machine_facts(plan.identity_dir.parent),
        labels=dict(plan.labels),
    )
    try:
        with enrolment(plan.address, ca_pem) as stub:
            answer: pb.JoinResponse = stub.Join(request, timeout=plan.timeout_s)
            return answer
    except Unavailable as e:
        raise Unavailable(
            f"{plan.address} speaks TLS and does not answer a join ({e}); is it the enrolment port "
            "(7441 by default), not the fleet port?"
        ) from e
