"""Prometheus text on loopback. Reads the counters; decides nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from remora_contract.errors import Refused
from remora_controller.counters import Counters


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
    """Plain HTTP. Raises Refused when the address cannot be had."""

    def __init__(self, host: str, port: int, counters: Counters) -> None:
        registry = CollectorRegistry()
        registry.register(ControllerCollector(counters))
        try:
            self._server: WSGIServer
            self._thread: threading.Thread
            self._server, self._thread = start_http_server(port, host, registry=registry)
        except OSError as e:
            raise Refused(
                f"metrics cannot listen on {host}:{port}: {e.strerror or e}; choose another "
                "--metrics-listen"
            ) from e
        self.port: int = self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
