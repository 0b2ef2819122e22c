"""The one-time join token: a secret for the controller, and the CA's hash for the device.

    remora-join-1.<secret, base64url>.<sha256 of the CA certificate's DER, hex>

The hash lets a device that has never seen the controller tell it from an impostor before it sends
the secret.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from remora_contract.errors import DocumentInvalid

_FORM = re.compile(r"remora-join-1\.([A-Za-z0-9_-]{22,86})\.([0-9a-f]{64})")


@dataclass(frozen=True)
class JoinToken:
    secret: str
    ca_sha256: str

    def encode(self) -> str:
        return f"remora-join-1.{self.secret}.{self.ca_sha256}"

    @staticmethod
    def decode(text: str) -> JoinToken:
        """Raises DocumentInvalid without repeating the secret."""
        match = _FORM.fullmatch(text.strip())
        if match is None:
            raise DocumentInvalid(
                "this is no join token; make one with `remora devices token` and paste all of it"
            )
        return JoinToken(match[1], match[2])
