"""The real controller as a process of its own, with what it costs: CPU, memory, bytes served."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import grpc
import psutil

from remora_controller import home as homes
from remora_protos.operator.v1 import operator_pb2_grpc as pb_grpc

PATIENCE_S = 600.0
_CODE = "from remora_controller.cli import main; main()"


def await_(what: str, condition: Callable[[], bool], limit_s: float = PATIENCE_S) -> float:
    """Seconds it took. Raises SystemExit naming what never happened."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > limit_s:
            raise SystemExit(f"never happened in {limit_s:.0f} s: {what}")
        time.sleep(0.2)
    return time.monotonic() - started


@dataclass(frozen=True)
class Cost:
    """Between two moments."""

    seconds: float
    cpu_s: float

    @property
    def share(self) -> float:
        """Of one core."""
        return self.cpu_s / self.seconds


class Controller:
    """`remora-controller serve` on free ports, and its first operator."""

    def __init__(self, root: Path, interval_s: float | None = None) -> None:
        """`interval_s` in place of the default for devices without a Watch stream."""
        self.home = homes.create(root, ["127.0.0.1"], datetime.now(timezone.utc))
        if interval_s is not None:
            text = self.home.config.read_text()
            text = re.sub("sync_interval_s = [0-9.]+", f"sync_interval_s = {interval_s}", text)
            offline = f"offline_after_s = {max(45.0, 3 * interval_s)}"
            self.home.config.write_text(re.sub("offline_after_s = [0-9.]+", offline, text))
        self.ports = {"fleet": 0, "enrolment": 0, "metrics": 0}

    def start(self) -> None:
        """On the ports of last time, if it ran before."""
        self.home.listening.unlink(missing_ok=True)
        options = {"listen": "fleet", "enrol-listen": "enrolment", "metrics-listen": "metrics"}
        where = [f"--{name}=127.0.0.1:{self.ports[port]}" for name, port in options.items()]
        command = [sys.executable, "-c", _CODE, "serve", str(self.home.root), *where]
        with (self.home.root.parent / "controller.log").open("ab") as log:
            self._process = subprocess.Popen([*command, "--log-level=warning"], stderr=log)
        await_("the controller's ports", self.home.listening.exists, 120.0)
        self.ports = json.loads(self.home.listening.read_text())
        self._measured = psutil.Process(self._process.pid)
        files = [(self.home.operator / n).read_bytes() for n in ("ca.pem", "operator.key")]
        certificate = (self.home.operator / "operator.pem").read_bytes()
        self._channel = grpc.secure_channel(
            f"127.0.0.1:{self.ports['fleet']}",
            grpc.ssl_channel_credentials(*files, certificate),
            [
                ("grpc.ssl_target_name_override", "remora-controller"),
                ("grpc.max_receive_message_length", 64 << 20),
            ],
        )
        self.operator = pb_grpc.OperatorStub(self._channel)

    def kill(self) -> None:
        """SIGKILL: nothing is flushed, nobody is told."""
        self._channel.close()
        self._process.kill()
        self._process.wait(30)

    def stop(self) -> None:
        self._channel.close()
        self._process.terminate()
        self._process.wait(60)

    def cpu_s(self) -> float:
        times = self._measured.cpu_times()
        return float(times.user + times.system)

    def rss_mb(self) -> float:
        return float(self._measured.memory_info().rss) / 1e6

    def cost_of(self, work: Callable[[], object]) -> Cost:
        cpu, started = self.cpu_s(), time.monotonic()
        work()
        return Cost(time.monotonic() - started, self.cpu_s() - cpu)

    def metric(self, name: str, labels: str = "") -> float:
        """From /metrics, which costs the controller next to nothing; 0 when it is not there."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports['metrics']}/metrics") as answer:
            text = answer.read().decode()
        pattern = rf"^remora_controller_{name}{re.escape(labels)} ([0-9.e+]+)$"
        found = re.search(pattern, text, re.MULTILINE)
        return float(found.group(1)) if found else 0.0

    def online(self) -> int:
        return int(self.metric("devices", '{status="online"}'))
