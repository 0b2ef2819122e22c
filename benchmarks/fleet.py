"""A fleet of simulated agents against a real controller: idle cost, a rollout, a reconnect storm.

    python benchmarks/fleet.py [--agents 1000] [--storm 2000] [--interval 10] [--work DIR]

The controller is a process of its own. The agents are this process: the agent's own protocol code,
state machine, downloads and state directories, stepped by a few threads instead of four each, and a
host that only says that it serves. Loopback, mutual TLS. State directories lie in --work (default:
/dev/shm), because a thousand devices share no disk.
"""

from __future__ import annotations

import argparse
import heapq
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import grpc
import psutil
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from remora_agent.config import AgentConfig
from remora_agent.control.agent import Parts
from remora_agent.control.client import ControllerClient
from remora_agent.control.compose import compose
from remora_agent.control.identity import Identity
from remora_agent.control.join import JoinPlan, join
from remora_contract.device_phase import FINAL, Phase
from remora_contract.digests import canonical_json
from remora_contract.join_token import JoinToken
from remora_controller import home as homes
from remora_protos.operator.v1 import operator_pb2 as pb
from remora_protos.operator.v1 import operator_pb2_grpc as pb_grpc
from tests.support.repository import Repository, make_release
from tests.support.scripted_host import ScriptedHost

WORKERS = 16
STAGED_GOAL_S, RSS_GOAL_MB, IDLE_GOAL = 60.0, 400.0, 0.02
PATIENCE_S = 600.0
_BEFORE_STAGED = frozenset(
    {None, Phase.ASSIGNED, Phase.ADMITTED, Phase.STAGING, Phase.REFUSED, Phase.FAILED}
)


class Controller:
    """`remora-controller serve` on free ports, and its first operator."""

    def __init__(self, root: Path, interval_s: float) -> None:
        self.home = homes.create(root, ["127.0.0.1"], datetime.now(timezone.utc))
        config = self.home.config.read_text().replace(
            "sync_interval_s = 10.0", f"sync_interval_s = {interval_s}"
        )
        offline = max(45.0, 3 * interval_s)
        self.home.config.write_text(
            config.replace("offline_after_s = 45.0", f"offline_after_s = {offline}")
        )
        code = "from remora_controller.cli import main; main()"
        zero = [f"--{name}=127.0.0.1:0" for name in ("listen", "enrol-listen", "metrics-listen")]
        command = [sys.executable, "-c", code, "serve", str(root), *zero, "--log-level=warning"]
        self.log = (root.parent / "controller.log").open("wb")
        self._process = subprocess.Popen(command, stderr=self.log, stdout=self.log)
        await_("the controller's ports", self.home.listening.exists, 30.0)
        self.ports = json.loads(self.home.listening.read_text())
        self.process = psutil.Process(self._process.pid)
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

    def cpu_s(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system

    def rss_mb(self) -> float:
        return self.process.memory_info().rss / 1e6

    def stop(self) -> None:
        self._channel.close()
        self._process.terminate()
        self._process.wait(30)
        self.log.close()


@dataclass
class Simulated:
    """One device. `turn` does what its four threads would do, and says when to come back."""

    identity: Identity
    parts: Parts
    sync_at: float = 0.0
    poked: threading.Event = field(default_factory=threading.Event)
    syncing: threading.Lock = field(default_factory=threading.Lock)

    def turn(self, now: float) -> float:
        """Monotonic time of the next turn."""
        wait_s = 0.0
        for _ in range(8):
            wait_s = self.parts.reconciler.step()
            if wait_s > 0:
                break
        if self.poked.is_set() or now >= self.sync_at:
            self.poked.clear()
            with self.syncing:
                self.sync_at = time.monotonic() + self.parts.sync.once()
        record = self.parts.reconciler.report().record
        is_idle = record is None or record.phase in FINAL
        return self.sync_at if is_idle and wait_s > 0 else time.monotonic() + min(wait_s, 1.0)

    @property
    def phase(self) -> Phase | None:
        record = self.parts.reconciler.report().record
        return None if record is None else record.phase


class Fleet:
    """Steps all devices when they are due; a poke makes one due at once."""

    def __init__(self) -> None:
        self.devices: list[Simulated] = []
        self._due: list[tuple[float, int]] = []
        self._changed = threading.Condition()
        self._busy: set[int] = set()
        self._stopping = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(WORKERS)]

    def start(self, devices: Sequence[Simulated], interval_s: float) -> None:
        self.devices = list(devices)
        now = time.monotonic()
        for i in range(len(self.devices)):
            heapq.heappush(self._due, (now + interval_s * i / len(self.devices), i))
        for thread in self._threads:
            thread.start()
        for i, device in enumerate(self.devices):
            device.parts.watch._on_poke = lambda i=i: self.poke(i)
            device.parts.reconciler.on_change = device.poked.set
            threading.Thread(target=device.parts.watch.run, daemon=True).start()

    def poke(self, index: int) -> None:
        self.devices[index].poked.set()
        with self._changed:
            heapq.heappush(self._due, (0.0, index))
            self._changed.notify()

    def _work(self) -> None:
        while (index := self._next()) is not None:
            due = self.devices[index].turn(time.monotonic())
            with self._changed:
                self._busy.discard(index)
                heapq.heappush(self._due, (due, index))
                self._changed.notify()

    def _next(self) -> int | None:
        with self._changed:
            while not self._stopping:
                now = time.monotonic()
                if self._due and self._due[0][0] <= now:
                    _, index = heapq.heappop(self._due)
                    if index not in self._busy:
                        self._busy.add(index)
                        return index
                    continue
                self._changed.wait(min(1.0, self._due[0][0] - now) if self._due else 1.0)
            return None

    def stop(self) -> None:
        self._stopping = True
        with self._changed:
            self._changed.notify_all()
        for device in self.devices:
            device.parts.watch.stop()
        for thread in self._threads:
            thread.join(5.0)
        for device in self.devices:
            device.parts.client.close()


def await_(what: str, condition: Callable[[], bool], limit_s: float = PATIENCE_S) -> float:
    """Seconds it took. Raises SystemExit naming what never happened."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > limit_s:
            raise SystemExit(f"never happened: {what}")
        time.sleep(0.2)
    return time.monotonic() - started


def enrol(controller: Controller, root: Path, count: int) -> list[Identity]:
    """Real joins, several at a time."""

    def one(index: int) -> Identity:
        token = controller.operator.CreateJoinToken(pb.CreateJoinTokenRequest()).token
        address = f"127.0.0.1:{controller.ports['enrolment']}"
        folder = root / f"device-{index}" / "identity"
        folder.parent.mkdir(parents=True)
        return join(JoinPlan(address, JoinToken.decode(token), folder, {"site": f"s{index % 7}"}))

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, range(count)))


def made(root: Path, index: int, identity: Identity) -> Simulated:
    config = AgentConfig(state_dir=str(root / f"device-{index}"))
    parts = compose(config, identity, ScriptedHost(), openers=[])
    parts.reconciler.start("benchmark")
    return Simulated(identity, parts)


def measure_idle(controller: Controller, seconds: float) -> float:
    """Share of a core."""
    cpu, started = controller.cpu_s(), time.monotonic()
    time.sleep(seconds)
    return (controller.cpu_s() - cpu) / (time.monotonic() - started)


def roll_out(controller: Controller, fleet: Fleet, release_json: bytes) -> dict[str, float]:
    info = controller.operator.CreateRelease(pb.CreateReleaseRequest(release_json=release_json))
    spec = pb.RolloutSpec(waves=[pb.Wave(percent=100.0)])
    started, cpu = time.monotonic(), controller.cpu_s()
    request = pb.StartRolloutRequest(release=info.release_id, spec=spec)
    rollout = controller.operator.StartRollout(request).rollout_id
    await_("all staged", lambda: all(d.phase not in _BEFORE_STAGED for d in fleet.devices))
    staged = time.monotonic() - started
    await_("all committed", lambda: all(d.phase is Phase.COMMITTED for d in fleet.devices))
    asked = pb.GetRolloutRequest(rollout_id=rollout)
    await_("completed", lambda: controller.operator.GetRollout(asked).state == "COMPLETED")
    return {
        "staged": staged,
        "completed": time.monotonic() - started,
        "cpu": controller.cpu_s() - cpu,
    }


def storm(fleet: Fleet, count: int) -> list[float]:
    """Seconds of each of `count` new connections with one Sync, all begun at once."""

    def one(index: int) -> float:
        device = fleet.devices[index % len(fleet.devices)]
        started = time.monotonic()
        client = ControllerClient(device.identity, None, timeout_s=120.0)
        try:
            with device.syncing:
                device.parts.sync.exchange_with(client)
        finally:
            client.close()
        return time.monotonic() - started

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


@contextmanager
def running(work: Path, arguments: argparse.Namespace) -> Iterator[tuple[Controller, Fleet]]:
    controller, fleet = Controller(work / "controller", arguments.interval), Fleet()
    try:
        started = time.monotonic()
        identities = enrol(controller, work / "devices", arguments.agents)
        print(f"joined {len(identities)} in {time.monotonic() - started:.1f} s", flush=True)
        devices = [made(work / "devices", i, identity) for i, identity in enumerate(identities)]
        fleet.start(devices, arguments.interval)
        await_("everybody online", lambda: _online(controller) == arguments.agents)
        print(f"all online after {time.monotonic() - started:.1f} s", flush=True)
        yield controller, fleet
    finally:
        fleet.stop()
        controller.stop()


def _online(controller: Controller) -> int:
    found = controller.operator.ListDevices(pb.ListDevicesRequest()).devices
    return Counter(d.status for d in found)["online"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--agents", type=int, default=1000)
    parser.add_argument("--storm", type=int, default=2000, help="connections begun at once")
    parser.add_argument("--interval", type=float, default=10.0, help="seconds between idle Syncs")
    parser.add_argument("--idle", type=float, default=30.0, help="seconds to measure at rest")
    parser.add_argument("--settle", type=float, default=20.0, help="seconds before measuring")
    parser.add_argument("--work", type=Path, default=Path("/dev/shm"))
    arguments = parser.parse_args()
    logging.disable(logging.ERROR)
    threading.stack_size(256 << 10)
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="fleet-") as folder:
        work = Path(folder)
        with running(work, arguments) as (controller, fleet):
            repository = Repository(controller.home.repository)
            release = make_release("fleet", repository.bundle(), repository.adapter())
            time.sleep(arguments.settle)
            idle = measure_idle(controller, arguments.idle)
            print(f"at rest: {idle:.1%} of a core", flush=True)
            rollout = roll_out(controller, fleet, canonical_json(release))
            print(f"rolled out: {rollout}", flush=True)
            time.sleep(arguments.settle)
            after = measure_idle(controller, arguments.idle)
            rss = controller.rss_mb()
            times = sorted(storm(fleet, arguments.storm)) if arguments.storm else []
            report(arguments, controller, idle, rollout, after, rss, times)


def report(
    arguments: argparse.Namespace,
    controller: Controller,
    idle: float,
    rollout: dict[str, float],
    after: float,
    rss: float,
    times: Sequence[float],
) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("", "measured", "goal"):
        table.add_column(column)
    table.add_row("agents, Sync every", f"{arguments.agents}, {arguments.interval:g} s", "")
    table.add_row("all staged after", f"{rollout['staged']:.1f} s", f"{STAGED_GOAL_S:g} s")
    table.add_row("all committed after", f"{rollout['completed']:.1f} s", "")
    table.add_row("controller CPU for it", f"{rollout['cpu']:.1f} s", "")
    table.add_row("controller RSS", f"{rss:.0f} MB", f"{RSS_GOAL_MB:g} MB")
    table.add_row("controller at rest before", f"{idle:.1%} of a core", f"{IDLE_GOAL:.0%}")
    table.add_row("controller at rest after", f"{after:.1%} of a core", f"{IDLE_GOAL:.0%}")
    if times:
        p99 = times[int(0.99 * (len(times) - 1))]
        text = f"p50 {statistics.median(times):.2f} s, p99 {p99:.2f} s, all {times[-1]:.2f} s"
        table.add_row(f"storm of {len(times)}", text, "")
        table.add_row("controller RSS after it", f"{controller.rss_mb():.0f} MB", "")
    Console().print(table)


if __name__ == "__main__":
    main()
