"""Prometheus /metrics on loopback: the latest sample and the histograms, nothing computed on a
scrape."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from remora_agent.telemetry.histograms import HistogramReading
from remora_agent.telemetry.source import Reading
from remora_contract.errors import Refused
from remora_contract.experiments import ARM_PREFIX, SHADOW_PREFIX

PREFIX = "remora_"
_OF_ARMS = ("experiment", "arm", "identity")


class ReadingsCollector(Collector):
    def __init__(
        self,
        latest: Callable[[], Iterable[Reading]],
        histograms: Callable[[], Iterable[HistogramReading]] | None = None,
    ) -> None:
        self._latest = latest
        self._histograms = histograms

    def collect(self) -> Iterator[Metric]:
        groups: dict[str, list[Reading]] = {}
        for reading in self._latest():
            groups.setdefault(reading.name, []).append(reading)
        yield from map(_family, groups.values())
        for histogram in self._histograms() if self._histograms is not None else ():
            family = HistogramMetricFamily(PREFIX + histogram.name, histogram.help)
            family.add_metric([], histogram.cumulative(), histogram.total)
            yield family


class MetricsServer:
    """Serves until closed. Raises Refused when the port is taken."""

    def __init__(
        self,
        host: str,
        port: int,
        latest: Callable[[], Iterable[Reading]],
        histograms: Callable[[], Iterable[HistogramReading]] | None = None,
    ) -> None:
        registry = CollectorRegistry()
        registry.register(ReadingsCollector(latest, histograms))
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as e:
            raise Refused(
                f"/metrics cannot listen on {host}:{port} ({e.strerror}); set "
                "telemetry.metrics_listen to another port"
            ) from e

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _family(readings: Sequence[Reading]) -> Metric:
    """One name; labels only where there are several to tell apart."""
    first, labelled = readings[0], any(r.label for r in readings)
    kind = CounterMetricFamily if first.is_counter else GaugeMetricFamily
    help_text = first.name.replace("_", " ")
    labels = _labels(first.name) if labelled else ()
    family = kind(PREFIX + first.name, help_text, labels=labels)
    for reading in readings:
        values = reading.label.split("/", len(labels) - 1) if labels else []
        family.add_metric(values, reading.value)
    return family


def _labels(name: str) -> Sequence[str]:
    if name.startswith((ARM_PREFIX, SHADOW_PREFIX)):
        return _OF_ARMS
    return ("use_case",) if name.startswith("use_case_") else ("sensor",)
