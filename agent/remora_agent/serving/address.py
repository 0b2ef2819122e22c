"""Addresses of the inference server and who may use them without TLS. Pure."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from remora_contract.errors import RequestInvalid

DEFAULT_LISTEN = "127.0.0.1:7450"
# Longest path a Unix socket address holds on Linux (sun_path, without the final NUL).
MAX_UNIX_PATH = 107


@dataclass(frozen=True)
class TcpAddress:
    host: str
    port: int  # 0: any free one

    @property
    def local(self) -> bool:
        """True when only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def target(self) -> str:
        """As gRPC wants it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class UnixAddress:
    path: str

    @property
    def local(self) -> bool:
        return True

    def target(self) -> str:
        return f"unix:{self.path}"


Address = TcpAddress | UnixAddress


def parse_address(text: str) -> Address:
    """`HOST:PORT`, `[IPV6]:PORT` or `unix:/path`. Raises RequestInvalid."""
    if text.startswith("unix:"):
        return _unix(text.removeprefix("unix:"))
    host, separator, port = text.rpartition(":")
    if not separator or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise RequestInvalid(f"address {text[:80]!r}: give HOST:PORT, [IPV6]:PORT or unix:/path")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise RequestInvalid(f"address {text[:80]!r}: write an IPv6 address as [IPV6]:PORT")
    if not host:
        raise RequestInvalid(f"address {text[:80]!r} has no host; to listen everywhere say 0.0.0.0")
    return TcpAddress(host, int(port))


def parse_socket(path: str) -> UnixAddress:
    """`/path` or `unix:/path`. Raises RequestInvalid."""
    return _unix(path.removeprefix("unix:"))


def _unix(path: str) -> UnixAddress:
    if not path.startswith("/"):
        raise RequestInvalid(f"address unix:{path[:80]}: the path must start with /")
    if len(path.encode()) > MAX_UNIX_PATH:
        raise RequestInvalid(
            f"address unix:{path[:80]}…: a socket path holds {MAX_UNIX_PATH} bytes"
        )
    return UnixAddress(path)
