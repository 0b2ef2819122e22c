"""Who hears of ended requests: request log, histograms, traces, put together once per process."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from remora_agent.telemetry import request_log
from remora_agent.telemetry.histograms import ServingHistograms
from remora_agent.telemetry.records import RequestRecords, Sink
from remora_agent.telemetry.request_log import RequestLog
from remora_agent.telemetry.traces import RequestTraces


@dataclass(frozen=True)
class Observing:
    """What is told of requests beyond counts."""

    request_log: RequestLog = RequestLog.OFF
    otlp_endpoint: str | None = None  # http[s]://HOST:PORT; None: no traces


class Observers:
    def __init__(self, observing: Observing) -> None:
        """Raises Refused for traces without their packages."""
        self.histograms = ServingHistograms()
        self._traces: RequestTraces | None = None
        sinks: list[Sink] = [self.histograms.observe]
        if observing.request_log is not RequestLog.OFF:
            # Asked for by name, so it is written whatever the level of the other logs.
            request_log.log.setLevel(logging.INFO)
            sinks.append(request_log.write)
        if observing.otlp_endpoint is not None:
            self._traces = RequestTraces.to_endpoint(observing.otlp_endpoint)
            sinks.append(self._traces.observe)
        texts = observing.request_log is RequestLog.TEXT
        self.records = RequestRecords(sinks, self.histograms.gap, texts=texts)

    def close(self) -> None:
        if self._traces is not None:
            self._traces.close()
