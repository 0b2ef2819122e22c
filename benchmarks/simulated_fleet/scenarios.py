"""What is measured, one function a scenario; each prints its figures as rows of a table."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.simulated_fleet.agents import Fleet, Simulated, enrol, made
from benchmarks.simulated_fleet.controller import Controller, await_
from benchmarks.simulated_fleet.pollers import Polling, enrol_in_store
from remora_agent.control.client import ControllerClient
from remora_contract.digests import canonical_json
from remora_contract.release import Release
from remora_protos.operator.v1 import operator_pb2 as pb
from tests.support.counting_forwarder import CountingForwarder, counting
from tests.support.repository import Repository, make_release

STAGED_GOAL_S, RSS_GOAL_MB, IDLE_GOAL, OVERHEAD_GOAL = 60.0, 400.0, 0.02, 64 << 10
ADAPTER_BYTES = 2_000_000
Row = tuple[str, str, str]  # what, measured, goal


def say(text: str) -> None:
    load = psutil.getloadavg()[0]
    print(f"{time.strftime('%H:%M:%S')} load {load:.0f}: {text}", flush=True)


@contextmanager
def running(
    work: Path,
    agents: int,
    interval_s: float | None,
    address: str | None = None,
    wire: CountingForwarder | None = None,
    levels: int = 0,
) -> Iterator[tuple[Controller, Fleet]]:
    """A controller with so many simulated agents online."""
    controller = Controller(work / "controller", interval_s)
    controller.start()
    if wire is not None:
        wire.target = controller.ports["fleet"]
    fleet = Fleet([])
    try:
        started = time.monotonic()
        identities = enrol(controller, work / "devices", agents)
        say(f"joined {agents} in {time.monotonic() - started:.1f} s")
        fleet = Fleet(
            [made(work / "devices", i, d, address, levels) for i, d in enumerate(identities)]
        )
        started = time.monotonic()
        fleet.start(min(10.0, agents / 100))
        await_("everybody online", lambda: controller.online() == agents)
        say(f"all online after {time.monotonic() - started:.1f} s")
        yield controller, fleet
    finally:
        fleet.stop()
        controller.stop()


def rest(controller: Controller, arguments: argparse.Namespace) -> float:
    """Share of a core, once everybody has come to rest."""
    time.sleep(arguments.settle)
    syncs = controller.metric("syncs_total")
    cost = controller.cost_of(lambda: time.sleep(arguments.idle))
    syncs = (controller.metric("syncs_total") - syncs) / cost.seconds
    say(f"at rest: {cost.share:.2%} of a core, {syncs:.1f} Syncs a second")
    return cost.share


def measure_rest(work: Path, arguments: argparse.Namespace) -> list[Row]:
    """With what devices measure: 16 levels and 4 counters every 10 s from each."""
    with running(work, arguments.agents, arguments.interval, levels=arguments.levels) as (
        controller,
        _,
    ):
        share = rest(controller, arguments)
        rss = controller.rss_mb()
    return [
        ("agents, levels each", f"{arguments.agents}, {arguments.levels}", ""),
        ("at rest", f"{share:.2%} of a core", f"{IDLE_GOAL:.0%}"),
        ("controller RSS", f"{rss:.0f} MB", f"{RSS_GOAL_MB:g} MB"),
    ]


def order(controller: Controller, release: Release, *waves: float) -> str:
    """Starts a rollout and says which."""
    request = pb.CreateReleaseRequest(release_json=canonical_json(release))
    info = controller.operator.CreateRelease(request)
    spec = pb.RolloutSpec(waves=[pb.Wave(percent=p) for p in waves])
    wanted = pb.StartRolloutRequest(release=info.release_id, spec=spec)
    return str(controller.operator.StartRollout(wanted).rollout_id)


def state(controller: Controller, rollout: str) -> str:
    asked = pb.GetRolloutRequest(rollout_id=rollout)
    return str(controller.operator.GetRollout(asked).state)


def measure_rollout(work: Path, arguments: argparse.Namespace) -> list[Row]:
    with running(work, arguments.agents, arguments.interval) as (controller, fleet):
        repository = Repository(controller.home.repository)
        before = rest(controller, arguments)
        release = make_release("fleet", repository.bundle(), repository.adapter())
        cpu, started = controller.cpu_s(), time.monotonic()
        own = psutil.Process().cpu_times()
        rollout = order(controller, release, 100.0)
        await_("all staged", lambda: fleet.all("is_staged"))
        staged = time.monotonic() - started
        await_("all committed", fleet.committed)
        await_("completed", lambda: state(controller, rollout) == "COMPLETED")
        completed, cpu = time.monotonic() - started, controller.cpu_s() - cpu
        now = psutil.Process().cpu_times()
        agents_cpu = now.user + now.system - own.user - own.system
        say(f"staged {staged:.1f} s, completed {completed:.1f} s, controller CPU {cpu:.1f} s")
        after = rest(controller, arguments)
        rows = [
            ("agents", str(arguments.agents), ""),
            ("at rest before", f"{before:.2%} of a core", f"{IDLE_GOAL:.0%}"),
            ("all staged after", f"{staged:.1f} s", f"{STAGED_GOAL_S:g} s"),
            ("all committed, rollout completed after", f"{completed:.1f} s", ""),
            ("CPU of the controller, of the agents", f"{cpu:.1f} s, {agents_cpu:.1f} s", ""),
            ("controller RSS", f"{controller.rss_mb():.0f} MB", f"{RSS_GOAL_MB:g} MB"),
            ("at rest after", f"{after:.2%} of a core", f"{IDLE_GOAL:.0%}"),
        ]
        if arguments.storm:
            rows += storm_rows(controller, storm(fleet.devices, arguments.storm))
        return rows


def measure_storm(work: Path, arguments: argparse.Namespace) -> list[Row]:
    with running(work, arguments.agents, arguments.interval) as (controller, fleet):
        return storm_rows(controller, storm(fleet.devices, arguments.storm))


def storm(devices: Sequence[Simulated], count: int) -> list[float]:
    """Seconds of each of `count` new connections with one Sync, all begun at once; sorted."""

    def one(index: int) -> float:
        device = devices[index % len(devices)]
        started = time.monotonic()
        with ControllerClient(device.identity, None, timeout_s=300.0) as client, device.syncing:
            device.parts.sync.exchange_with(client)
        return time.monotonic() - started

    with ThreadPoolExecutor(count) as pool:
        return sorted(pool.map(one, range(count)))


def storm_rows(controller: Controller, times: Sequence[float]) -> list[Row]:
    half, most = (times[int(q * (len(times) - 1))] for q in (0.5, 0.99))
    text = f"p50 {half:.2f} s, p99 {most:.2f} s, all {times[-1]:.2f} s"
    return [
        (f"storm of {len(times)} new connections", text, "bounded p99"),
        ("controller RSS after it", f"{controller.rss_mb():.0f} MB", ""),
    ]


def measure_restart(work: Path, arguments: argparse.Namespace) -> list[Row]:
    """SIGKILL while the second of three waves is under way, a start on the same port."""
    with running(work, arguments.agents, arguments.interval) as (controller, fleet):
        repository = Repository(controller.home.repository)
        release = make_release("fleet", repository.bundle(), repository.adapter())
        rollout = order(controller, release, 10.0, 60.0, 100.0)
        first = arguments.agents // 10
        await_("the second wave", lambda: _assigned(fleet) > first)
        controller.kill()
        assigned = _assigned(fleet)
        say(f"killed with {assigned} of {arguments.agents} assigned")
        time.sleep(arguments.down)
        started = time.monotonic()
        controller.start()
        await_("completed", lambda: state(controller, rollout) == "COMPLETED")
        fleet.check()
        once = sum(d.generation == 1 for d in fleet.devices)
        return [
            ("assigned when it was killed", f"{assigned} of {arguments.agents}", ""),
            ("completed after the new start", f"{time.monotonic() - started:.1f} s", ""),
            ("committed", str(fleet.committed()), "True"),
            ("devices with exactly one assignment", str(once), str(arguments.agents)),
        ]


def _assigned(fleet: Fleet) -> int:
    fleet.check()
    return sum(d.generation > 0 for d in fleet.devices)


def measure_adapter(work: Path, arguments: argparse.Namespace) -> list[Row]:
    """Every byte on the wire of the fleet's port, through a forwarder that all agents dial."""
    with counting() as wire:
        address = f"127.0.0.1:{wire.port}"
        with running(work, arguments.agents, arguments.interval, address, wire) as (c, fleet):
            repository = Repository(c.home.repository)
            bundle = repository.bundle(size=20_000_000)
            _complete(c, fleet, make_release("base", bundle))
            before, fetched = wire.passed, c.metric("fetched_bytes_total")
            adapter = repository.adapter(size=ADAPTER_BYTES)
            _complete(c, fleet, make_release("adapter", bundle, adapter))
            passed, fetched = wire.passed - before, c.metric("fetched_bytes_total") - fetched
    size, count = sum(f.size for f in adapter.files), arguments.agents
    return [
        ("adapter (its files)", f"{size:,} bytes", ""),
        ("served by the repository, a device", f"{fetched / count:,.0f} bytes", ""),
        ("more than the adapter, both ways, a device", f"{passed / count - size:,.0f}", "65,536"),
    ]


def _complete(controller: Controller, fleet: Fleet, release: Release) -> None:
    rollout = order(controller, release, 100.0)
    await_("completed", lambda: state(controller, rollout) == "COMPLETED")
    fleet.check()


def measure_polling(work: Path, arguments: argparse.Namespace) -> list[Row]:
    interval = arguments.interval or 60.0
    controller = Controller(work / "controller", interval)
    devices = enrol_in_store(controller, arguments.agents)
    say(f"enrolled {len(devices)}")
    controller.start()
    try:
        polling = Polling(controller, devices)
        found = asyncio.run(polling.run(interval, arguments.settle, interval))
        tally = polling.tally
        online, rss = controller.online(), controller.rss_mb()
    finally:
        controller.stop()
    latency = f"p50 {tally.quantile(0.5) * 1e3:.1f} ms, p99 {tally.quantile(0.99) * 1e3:.1f} ms"
    return [
        ("devices, Sync every", f"{arguments.agents}, {polling.asked_s:g} s", ""),
        ("Syncs a second", f"{found['per_s']:.1f}", f"{arguments.agents / interval:.1f}"),
        ("failed", str(tally.failed), "0"),
        ("a Sync takes", latency, ""),
        ("controller", f"{found['share']:.1%} of a core, {rss:.0f} MB", ""),
        ("online at the end", str(online), str(arguments.agents)),
    ]


SCENARIOS: dict[str, Callable[[Path, argparse.Namespace], list[Row]]] = {
    "rest": measure_rest,
    "rollout": measure_rollout,
    "storm": measure_storm,
    "restart": measure_restart,
    "adapter": measure_adapter,
    "polling": measure_polling,
}
