"""Enrolment: a one-time token, or an expired certificate, for a client certificate."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

from remora_contract.errors import RequestInvalid, Unauthenticated
from remora_contract.join_token import JoinToken
from remora_controller import pki
from remora_controller.counters import Counters
from remora_controller.domain import Device
from remora_controller.operations import secret_hash
from remora_controller.services.admission import Admission
from remora_controller.services.calls import Context, unary
from remora_controller.services.wire import facts_of, labels_of
from remora_controller.store.protocol import Store
from remora_controller.store_thread import StoreThread
from remora_protos.control.v1 import control_pb2 as pb
from remora_protos.control.v1 import control_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)
_NOT_IN_ID = re.compile(r"[^a-z0-9-]+")


class EnrolmentService(pb_grpc.EnrolmentServicer):
    def __init__(
        self,
        store: Store,
        thread: StoreThread,
        authority: pki.Authority,
        counters: Counters,
        clock: Callable[[], float],
        random_bytes: Callable[[int], bytes],
        fleet_port: int,
        admission: Admission,
    ) -> None:
        self._store = store
        self._thread = thread
        self._authority = authority
        self._counters = counters
        self._clock = clock
        self._random_bytes = random_bytes
        self._fleet_port = fleet_port
        self._admission = admission

    @unary
    async def Join(self, request: pb.JoinRequest, context: Context) -> pb.JoinResponse:
        token = JoinToken.decode(request.token)
        if token.ca_sha256 != self._authority.der_sha256:
            raise Unauthenticated("the join token is for another controller")
        csr = pki.load_request(request.csr_pem)
        now, facts = self._clock(), facts_of(request.facts)
        wanted = Device(
            device_id=device_id_for(facts.hostname, self._random_bytes(4)),
            enrolled_at=now,
            key_fingerprint=csr.key_fingerprint,
            facts=facts,
            device_labels=labels_of(request.labels),
        )
        device = await self._thread.call(self._store.enrol, secret_hash(token.secret), wanted, now)
        certificate = self._authority.issue(
            request.csr_pem, pki.Role.DEVICE, device.device_id, pki.utc(now)
        )
        self._counters.joins += 1
        log.info("device.joined", extra={"device": device.device_id, "hostname": facts.hostname})
        return pb.JoinResponse(
            device_id=device.device_id,
            certificate_pem=certificate,
            ca_pem=self._authority.pem,
            fleet_port=self._fleet_port,
        )

    @unary
    async def RenewExpired(
        self, request: pb.RenewExpiredRequest, context: Context
    ) -> pb.RenewResponse:
        """The request is signed by the key that the expired certificate names: whoever replays one
        gets a certificate for a key that he does not have."""
        now = pki.utc(self._clock())
        identity = self._authority.expired_device(request.certificate_pem, now)
        device = await self._admission.known_device(identity)
        asked = pki.load_request(request.csr_pem).key_fingerprint
        if not asked == identity.key_fingerprint == device.key_fingerprint:
            raise RequestInvalid("renewal is for the key that the device joined with; join again")
        certificate = self._authority.issue(request.csr_pem, pki.Role.DEVICE, device.device_id, now)
        log.info("device.renewed_expired", extra={"device": device.device_id})
        return pb.RenewResponse(certificate_pem=certificate, ca_pem=self._authority.pem)


def device_id_for(hostname: str, random: bytes) -> str:
    """`orin-07-3fa2c1d9`: says something to people, collides with nobody."""
    name = _NOT_IN_ID.sub("-", hostname.lower()).strip("-")[:40] or "device"
    return f"{name}-{random.hex()}"
