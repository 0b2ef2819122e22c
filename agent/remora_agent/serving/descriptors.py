"""File descriptors: how many this process may have, and how many of them callers may hold.

A process without any left cannot open an adapter or read how much memory is free. So each surface
lets in only so many connections, and what is beyond is closed at once.
"""

from __future__ import annotations

import logging
import resource

log = logging.getLogger(__name__)
WANTED = 65_536  # as systemd/remora-agent.service asks for
MAX_CONNECTIONS = 4096  # of one surface
_SURFACES = 4  # gRPC, HTTP, unix sockets; as much again stays for files


def raise_limit(wanted: int = WANTED) -> None:
    """Towards `wanted`, as far as this process may without anybody's leave; a shell often gives
    it 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reached = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft == resource.RLIM_INFINITY or soft >= reached:
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (reached, hard))
    log.info("descriptors.raised", extra={"was": soft, "now": reached})


def max_connections() -> int:
    """How many one surface may hold, by the limit that is set now."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, soft // _SURFACES))
