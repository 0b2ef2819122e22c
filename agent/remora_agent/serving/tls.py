"""Which transport security an address gets; reads the PEM files it names. Knows no service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from remora_agent.serving.address import Address
from remora_contract.errors import DocumentInvalid, Refused, RequestInvalid

_MAX_PEM_BYTES = 1 << 20


@dataclass(frozen=True)
class ServerTls:
    """`client_ca`: callers must then show a certificate that it signed."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True)
class ClientTls:
    """`ca` checks the server; certificate and key are shown to it when it asks (mutual TLS).

    `server_name` is the name its certificate must carry, when that is not the address's host.
    """

    ca: Path
    certificate: Path | None = None
    key: Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise RequestInvalid("TLS: give certificate and key together, or neither")


def server_credentials(address: Address, tls: ServerTls | None) -> grpc.ServerCredentials | None:
    """None where plaintext is safe. Raises Refused off loopback without TLS, DocumentInvalid."""
    if tls is None:
        if address.local:
            return None
        raise Refused(
            f"{address.target()} can be reached from other machines: give --tls-cert and "
            "--tls-key (and --tls-client-ca to admit known clients only), or listen on "
            "127.0.0.1 or unix:/path"
        )
    pair = (read_pem(tls.key), read_pem(tls.certificate))
    client_ca = read_pem(tls.client_ca) if tls.client_ca else None
    return grpc.ssl_server_credentials([pair], client_ca, require_client_auth=client_ca is not None)


def channel_credentials(address: Address, tls: ClientTls | None) -> grpc.ChannelCredentials | None:
    """None where plaintext is safe. Raises Refused off loopback without TLS, DocumentInvalid."""
    if tls is None:
        if address.local:
            return None
        raise Refused(
            f"{address.target()} is another machine: give tls=ClientTls(ca=…), the CA that signed "
            "the agent's certificate"
        )
    return grpc.ssl_channel_credentials(
        root_certificates=read_pem(tls.ca),
        private_key=read_pem(tls.key) if tls.key else None,
        certificate_chain=read_pem(tls.certificate) if tls.certificate else None,
    )


def read_pem(path: Path) -> bytes:
    """Raises DocumentInvalid when it cannot be read or holds no PEM block."""
    try:
        with path.open("rb") as f:
            data = f.read(_MAX_PEM_BYTES + 1)
    except OSError as e:
        raise DocumentInvalid(f"{path} cannot be read: {e.strerror or e}") from e
    if len(data) > _MAX_PEM_BYTES or b"-----BEGIN " not in data:
        raise DocumentInvalid(f"{path} is no PEM file")
    return data
