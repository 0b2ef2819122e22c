"""The addresses of one gRPC server: each taken whole or refused by name. Knows no service."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import grpc

from remora_agent.serving.address import Address, TcpAddress, UnixAddress
from remora_agent.serving.tls import ServerTls, server_credentials
from remora_agent.serving.unix_gate import UnixGate
from remora_contract.errors import Refused


class Listening:
    """One event loop's. `bind` before the server starts, `open` after, `close` at the end."""

    def __init__(
        self,
        addresses: Sequence[Address],
        tls: ServerTls | None,
        allowed_users: Collection[int] | None,
    ) -> None:
        """Raises Refused off loopback without TLS, DocumentInvalid (a PEM file)."""
        self._addresses = tuple((a, server_credentials(a, tls)) for a in addresses)
        self._allowed = allowed_users
        self._gates: list[UnixGate] = []

    def bind(self, server: Any) -> tuple[Address, ...]:
        """The addresses taken, port 0 being the one that was free. Raises Refused."""
        bound: list[Address] = []
        for address, credentials in self._addresses:
            if isinstance(address, UnixAddress):
                self._gates.append(gate := UnixGate(address, self._allowed))
                # The gate knows who is there and encrypts nothing: no byte leaves the machine.
                _add(server, gate.inner, None)
                bound.append(address)
            else:
                bound.append(TcpAddress(address.host, _add(server, address, credentials)))
        return tuple(bound)

    async def open(self) -> None:
        """Lets callers of unix sockets in. Raises Refused."""
        for gate in self._gates:
            await gate.open()

    async def close(self) -> None:
        for gate in self._gates:
            await gate.close()


def _add(server: Any, address: Address, credentials: grpc.ServerCredentials | None) -> int:
    target = address.target()
    try:
        if credentials is None:
            return int(server.add_insecure_port(target))
        return int(server.add_secure_port(target, credentials))
    except RuntimeError as e:  # what grpc raises for every reason
        raise Refused(
            f"cannot listen on {target}: it is taken or not an address of this machine"
        ) from e
