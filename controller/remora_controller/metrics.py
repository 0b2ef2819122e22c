"""Prometheus text on loopback. Reads the counters; decides nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from remora_contract.errors import Refused
from remora_controller.counters import Counters

log = logging.getLogger(__name__)
MAX_HEAD = 16 << 10
READ_TIMEOUT_S = 5.0


class ControllerCollector(Collector):
    def __init__(self, counters: Counters) -> None:
        self._counters = counters

    def collect(self) -> Iterator[Metric]:
        yield _by_label(
            "remora_controller_devices",
            "Devices by status.",
            "status",
            self._counters.devices_by_status,
        )
        yield _by_label(
            "remora_controller_rollouts",
            "Rollouts by state.",
            "state",
            self._counters.rollouts_by_state,
        )
        yield _by_label(
            "remora_controller_late_devices",
            "Devices that took a release after its waves and are judged or did not pass.",
            "state",
            self._counters.late_by_state,
        )
        watchers = self._counters.watchers
        yield GaugeMetricFamily(
            "remora_controller_watch_streams", "Open Watch streams.", value=watchers
        )
        for name, help_, value in (
            ("syncs", "Sync calls answered or refused.", self._counters.syncs),
            ("joins", "Devices that joined.", self._counters.joins),
            ("fetched_bytes", "Bytes of artifacts sent.", self._counters.fetched_bytes),
        ):
            yield CounterMetricFamily(f"remora_controller_{name}", help_, value=value)


def _by_label(name: str, help_: str, label: str, values: dict[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, help_, labels=[label])
    for value, count in sorted(values.items()):
        family.add_metric([value], count)
    return family


class MetricsServer:
    """`GET /metrics` over plain HTTP/1.1, one answer per connection, on the event loop."""

    def __init__(self, counters: Counters) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(ControllerCollector(counters))
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def start(self, host: str, port: int) -> int:
        """The port it got. Raises Refused when the address cannot be had."""
        try:
            self._server = await asyncio.start_server(self._answer, host, port, limit=MAX_HEAD)
        except OSError as e:
            raise Refused(
                f"metrics cannot listen on {host}:{port}: {e.strerror or e}; choose another "
                "--metrics-listen"
            ) from e
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            for writer in self._open.values():
                writer.transport.abort()
            await asyncio.gather(*self._open)
            await self._server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # start_server makes one for each connection
        self._open[task] = writer
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), READ_TIMEOUT_S)
            writer.write(self._response(head))
            await writer.drain()
        except (asyncio.TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            log.debug("metrics.bad_request")
        except ConnectionError:
            log.debug("metrics.hung_up")
        finally:
            del self._open[task]
            writer.close()

    def _response(self, head: bytes) -> bytes:
        if not head.startswith((b"GET /metrics ", b"GET /metrics?")):
            return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        body = generate_latest(self._registry)
        return (
            b"HTTP/1.1 200 OK\r\n"
            + f"Content-Type: {CONTENT_TYPE_LATEST}\r\n".encode()
            + f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
            + body
        )
