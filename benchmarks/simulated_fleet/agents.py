"""Many agents in one process: the agent's own client, state machine, downloads, spools and state
directories, and a host that only says that it serves.

An agent has four threads; here a few threads step all of them when they are due, each agent's Watch
stream keeps a thread of its own. Metrics are made up where a scenario wants them, as many and as
often as a device measures.
"""

from __future__ import annotations

import heapq
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from benchmarks.simulated_fleet.controller import Controller
from remora_agent.config import AgentConfig, ControllerConfig
from remora_agent.control.agent import Parts
from remora_agent.control.compose import compose
from remora_agent.control.identity import Identity
from remora_agent.control.join import JoinPlan, join
from remora_agent.telemetry.source import Reading
from remora_contract.device_phase import FINAL, Phase
from remora_contract.join_token import JoinToken
from remora_protos.operator.v1 import operator_pb2 as pb
from tests.support.scripted_host import ScriptedHost

WORKERS = 16
SAMPLE_S = 10.0  # the agent's default
_STEPS_A_TURN = 8
_BEFORE_STAGED = frozenset(
    {None, Phase.ASSIGNED, Phase.ADMITTED, Phase.STAGING, Phase.REFUSED, Phase.FAILED}
)
# A waiting stream of grpc's synchronous client wakes ten times a second to look for signals. One
# agent does not notice; a thousand in one interpreter would do nothing else.
grpc._common.MAXIMUM_WAIT_TIMEOUT = 30.0


@dataclass
class Simulated:
    """One device. `turn` does what its four threads would do, and says when to come back."""

    identity: Identity
    parts: Parts
    sync_at: float = 0.0
    levels: int = 0  # measured every SAMPLE_S beside four counters; 0: nothing is measured
    sampled_at: float = field(default_factory=time.time)
    poked: threading.Event = field(default_factory=threading.Event)
    syncing: threading.Lock = field(default_factory=threading.Lock)

    def turn(self, now: float) -> float:
        """Monotonic time of the next turn."""
        for _ in range(_STEPS_A_TURN):
            wait_s = self.parts.reconciler.step()
            if wait_s > 0:
                break
        if self.poked.is_set() or now >= self.sync_at:
            self.poked.clear()
            self._measure(time.time())
            with self.syncing:
                self.sync_at = time.monotonic() + self.parts.sync.once()
        if self.poked.is_set():  # it was assigned something
            return 0.0
        is_idle = self.phase is None or self.phase in FINAL
        if is_idle and wait_s > 0:
            return self.sync_at
        return min(self.sync_at, time.monotonic() + min(wait_s, 1.0))

    def _measure(self, now: float) -> None:
        """What a sampler would have measured since the last Sync."""
        while self.levels and self.sampled_at + SAMPLE_S <= now:
            self.sampled_at += SAMPLE_S
            readings = [
                *(Reading(f"level_{n}", self.sampled_at % (n + 7)) for n in range(self.levels)),
                *(Reading(f"count_{n}_total", self.sampled_at) for n in range(4)),
            ]
            self.parts.telemetry.spool.add(readings, self.sampled_at)

    @property
    def phase(self) -> Phase | None:
        record = self.parts.reconciler.report().record
        return None if record is None else record.phase

    @property
    def generation(self) -> int:
        record = self.parts.reconciler.report().record
        return 0 if record is None else record.desired.generation

    @property
    def is_staged(self) -> bool:
        return self.phase not in _BEFORE_STAGED


class Fleet:
    """Steps all devices when they are due; a poke makes one due at once."""

    def __init__(self, devices: Sequence[Simulated]) -> None:
        self.devices = list(devices)
        self._heap: list[tuple[float, int]] = []
        self._due = [math.inf] * len(devices)  # an entry of the heap that differs is stale
        self._busy: set[int] = set()
        self._changed = threading.Condition()
        self._stopping = False
        self._pool = ThreadPoolExecutor(WORKERS)
        self._workers: list[Future[None]] = []

    def start(self, spread_s: float) -> None:
        now = time.monotonic()
        for i, device in enumerate(self.devices):
            device.parts.watch._on_poke = lambda i=i: self.poke(i)
            device.parts.reconciler.on_change = device.poked.set
            with self._changed:
                self._schedule(i, now + spread_s * i / len(self.devices))
        self._workers = [self._pool.submit(self._work) for _ in range(WORKERS)]
        for device in self.devices:
            threading.Thread(target=device.parts.watch.run, daemon=True).start()

    def poke(self, index: int) -> None:
        self.devices[index].poked.set()
        with self._changed:
            self._schedule(index, 0.0)

    def check(self) -> None:
        """Raises what ended a worker: an agent's error must not look like a slow fleet."""
        for worker in self._workers:
            if worker.done():
                worker.result()

    def all(self, what: str) -> bool:
        """Whether `what` (a property of a device) holds for every device."""
        self.check()
        return all(getattr(d, what) for d in self.devices)

    def committed(self) -> bool:
        self.check()
        return all(d.phase is Phase.COMMITTED for d in self.devices)

    def _schedule(self, index: int, at: float) -> None:
        """With the lock held."""
        if index not in self._busy and at < self._due[index]:
            self._due[index] = at
            heapq.heappush(self._heap, (at, index))
            self._changed.notify()

    def _work(self) -> None:
        while (index := self._next()) is not None:
            due = self.devices[index].turn(time.monotonic())
            with self._changed:
                self._busy.discard(index)
                poked = self.devices[index].poked.is_set()
                self._schedule(index, 0.0 if poked else due)

    def _next(self) -> int | None:
        with self._changed:
            while not self._stopping:
                now = time.monotonic()
                if not self._heap or self._heap[0][0] > now:
                    wait_s = self._heap[0][0] - now if self._heap else 1.0
                    self._changed.wait(min(1.0, wait_s))
                    continue
                at, index = heapq.heappop(self._heap)
                if at == self._due[index]:
                    self._due[index] = math.inf
                    self._busy.add(index)
                    return index
            return None

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for device in self.devices:
            device.parts.watch.stop()
        self._pool.shutdown()
        for device in self.devices:
            device.parts.client.close()


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


def made(
    root: Path, index: int, identity: Identity, address: str | None = None, levels: int = 0
) -> Simulated:
    """`address` in place of the controller's: a counting forwarder in front of it."""
    section = ControllerConfig(address=address)
    config = AgentConfig(state_dir=str(root / f"device-{index}"), controller=section)
    parts = compose(config, identity, ScriptedHost(), openers=[])
    parts.reconciler.start("benchmark")
    return Simulated(identity, parts, levels=levels)
