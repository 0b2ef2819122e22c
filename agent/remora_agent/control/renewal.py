"""A fresh certificate at two thirds of the old one's life or, over the enrolment port, after its
end. The old one stays until the new one has carried a Sync. Knows the order of steps and when to
try again; owns no connection.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from remora_agent.control.certificates import check_own, expires_at, make_request, renew_at
from remora_agent.control.client import ControllerClient, enrolment
from remora_agent.control.identity import Identity, replace_certificate
from remora_contract.errors import RemoraError
from remora_protos.control.v1 import control_pb2 as pb

log = logging.getLogger(__name__)
RETRY_S = 3600.0
EXPIRED_RETRY_S = 60.0
_TIMEOUT_S = 15.0
# A certificate request, PEM, for an answer.
Ask = Callable[[bytes], pb.RenewResponse]


class Renewal:
    def __init__(
        self,
        directory: Path,
        connect: Callable[[Identity], ControllerClient],
        prove: Callable[[ControllerClient], None],
        adopt: Callable[[ControllerClient], None],
    ) -> None:
        """`prove` carries one call through the new client, `adopt` makes it the agent's."""
        self._directory, self._connect = directory, connect
        self._prove, self._adopt = prove, adopt

    def renew(self, identity: Identity, ask: Ask, now: datetime) -> Identity | None:
        """The identity to use from now on, or None when it did not work this time."""
        try:
            answer = ask(make_request(identity.key_pem, identity.device_id))
            check_own(answer.certificate_pem, identity.key_pem, identity.ca_pem, now)
        except RemoraError as e:
            log.warning("certificate.not_renewed", extra={"cause": str(e)})
            return None
        fresh = replace(identity, certificate_pem=answer.certificate_pem)
        fresh_client = self._connect(fresh)
        try:
            self._prove(fresh_client)
        except RemoraError as e:
            log.warning("certificate.not_proven", extra={"cause": str(e)})
            fresh_client.close()
            return None
        replace_certificate(self._directory, fresh.certificate_pem, fresh.ca_pem)
        self._adopt(fresh_client)
        log.info("certificate.renewed", extra={"device_id": identity.device_id})
        return fresh


class Keeper:
    """Keeps the identity in use valid. Both methods run on the Sync loop's thread."""

    def __init__(
        self,
        identity: Identity,
        renewal: Renewal,
        client: Callable[[], ControllerClient],
        enrolment_address: str,
        now: Callable[[], datetime],
        monotonic_s: Callable[[], float],
    ) -> None:
        """`client` is the one in use; `enrolment_address` is HOST:PORT. Pauses are measured with
        `monotonic_s`: a clock that was wrong and is set must not hold a renewal up."""
        self._identity, self._renewal, self._client = identity, renewal, client
        self._enrolment, self._now, self._monotonic_s = enrolment_address, now, monotonic_s
        self._not_before_s = -math.inf

    def after_sync(self) -> None:
        """The controller is there: renew when it is time."""
        if self._now() >= renew_at(self._identity.certificate_pem):
            self._try(self._client().renew, RETRY_S)

    def after_failure(self) -> None:
        """Mutual TLS fails for ever once the certificate has expired."""
        if self._now() > expires_at(self._identity.certificate_pem):
            self._try(self._ask_expired, EXPIRED_RETRY_S)

    def _try(self, ask: Ask, retry_s: float) -> None:
        if self._monotonic_s() < self._not_before_s:
            return
        self._not_before_s = self._monotonic_s() + retry_s
        self._identity = self._renewal.renew(self._identity, ask, self._now()) or self._identity

    def _ask_expired(self, csr_pem: bytes) -> pb.RenewResponse:
        log.warning("certificate.expired", extra={"enrolment": self._enrolment})
        expired = self._identity.certificate_pem
        request = pb.RenewExpiredRequest(certificate_pem=expired, csr_pem=csr_pem)
        with enrolment(self._enrolment, self._identity.ca_pem) as stub:
            answer: pb.RenewResponse = stub.RenewExpired(request, timeout=_TIMEOUT_S)
            return answer
