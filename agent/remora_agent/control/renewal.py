"""A fresh certificate at two thirds of the old one's life. The old one stays until the new one has
carried a Sync. Knows the order of steps; when to try again after a failure is decided here too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from remora_agent.control.certificates import check_own, make_request, renew_at
from remora_agent.control.client import ControllerClient
from remora_agent.control.identity import Identity, replace_certificate
from remora_contract.errors import RemoraError

log = logging.getLogger(__name__)
RETRY_S = 3600.0


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

    def due(self, identity: Identity, now: datetime) -> bool:
        return now >= renew_at(identity.certificate_pem)

    def renew(self, identity: Identity, client: ControllerClient, now: datetime) -> Identity | None:
        """The identity to use from now on, or None when it did not work this time."""
        try:
            answer = client.renew(make_request(identity.key_pem, identity.device_id))
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
