"""Prometheus /metrics of the serving process. Reads a mapping when scraped; measures nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from remora_agent.serving.address import TcpAddress
from remora_contract.errors import Refused, Unsupported

if TYPE_CHECKING:
    from prometheus_client import Metric

log = logging.getLogger(__name__)

ReadMetrics = Callable[[], Mapping[str, float]]


class MetricsCollector:
    """Turns `requests_total` into counter `remora_requests_total`, anything else into a gauge."""

    def __init__(self, read: ReadMetrics) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for name, value in sorted(self._read().items()):
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield family(f"remora_{name}", f"Serving metric {name}.", value=value)


def serve_metrics(address: TcpAddress, read: ReadMetrics) -> Callable[[], None]:
    """Plain HTTP on loopback, in a thread of its own; returns what ends it.

    Raises Refused off loopback (metrics carry no login) or when the port is taken, Unsupported
    without prometheus-client.
    """
    if not address.local:
        raise Refused(
            f"--metrics-listen {address.target()}: metrics are served on loopback only; "
            "scrape them through a proxy that adds TLS"
        )
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError as e:
        raise Unsupported("--metrics-listen needs: pip install prometheus-client") from e
    registry = CollectorRegistry()
    registry.register(MetricsCollector(read))
    try:
        server, thread = start_http_server(address.port, address.host, registry)
    except OSError as e:
        raise Refused(f"--metrics-listen {address.target()}: {e.strerror or e}") from e
    log.info("metrics.listening", extra={"port": server.server_port})

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
