"""grpc.health.v1: what serves, and whoever watches hears of every change.

grpcio-health-checking's own service forgets all watchers of a name when the first of them leaves,
so that the others never hear that the agent drains.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """One event loop's. The names that have a state are the agent's own, and bounded so."""

    def __init__(self, services: Iterable[str]) -> None:
        """None of `services` serves yet."""
        self._states: dict[str, int] = dict.fromkeys(services, _NOT_SERVING)
        self._changed = asyncio.Event()  # of this state; the next one has its own

    def set(self, service: str, state: int) -> None:
        self._states[service] = state
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> health_pb2.HealthCheckResponse:
        state = self._states.get(request.service)
        if state is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service[:80]!r}")
        return health_pb2.HealthCheckResponse(status=state)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        """The state now, and each one that differs from the last told, until the watcher leaves."""
        unknown, told = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN, None
        while True:
            changed, state = self._changed, self._states.get(request.service, unknown)
            if state != told:
                await context.write(health_pb2.HealthCheckResponse(status=state))
                told = state
            await changed.wait()
