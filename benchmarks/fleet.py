"""A fleet of simulated agents against a real controller process, over loopback and mutual TLS.

    python benchmarks/fleet.py [SCENARIO] [--agents N] [--work DIR]

rest     at rest, with samples of what devices measure (--levels each beside four counters)
rollout  at rest, a rollout to everybody at once, at rest again (--storm N: then a storm)
storm    N new connections with one Sync each, all begun at once
restart  the controller is killed in the second of three waves, and started again
adapter  bytes on the wire for a release that differs in one adapter
polling  devices reduced to their Sync calls (see benchmarks/simulated_fleet/pollers.py)

Otherwise the agents are the agent's own protocol code, state machine, downloads and state
directories in this one process, stepped by a few threads instead of four each, with a host that
only says that it serves (benchmarks/simulated_fleet/agents.py). State directories lie in --work
(default: /dev/shm), because a thousand devices share no disk.
"""

from __future__ import annotations

import argparse
import logging
import resource
import sys
import tempfile
import threading
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.simulated_fleet.scenarios import SCENARIOS

_AGENTS = {
    "rest": 1000,
    "rollout": 1000,
    "storm": 1000,
    "restart": 200,
    "adapter": 50,
    "polling": 10_000,
}
_STORM = {"storm": 2000}


def main() -> None:
    arguments = _arguments()
    logging.disable(logging.ERROR)
    threading.stack_size(256 << 10)
    _allow_descriptors()
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="fleet-") as folder:
        rows = SCENARIOS[arguments.scenario](Path(folder), arguments)
    table = Table(box=None, pad_edge=False)
    for column in (arguments.scenario, "measured", "goal"):
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)


def _allow_descriptors() -> None:
    """A connection each, and an agent's database and files; the controller inherits it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("scenario", nargs="?", default="rollout", choices=SCENARIOS)
    parser.add_argument("--agents", type=int, help=f"devices (default: {_AGENTS})")
    parser.add_argument("--storm", type=int, help="connections begun at once")
    parser.add_argument(
        "--interval", type=float, help="sync_interval_s (default: the controller's; polling: 60)"
    )
    parser.add_argument("--idle", type=float, default=60.0, help="seconds to measure at rest")
    parser.add_argument("--settle", type=float, default=75.0, help="seconds before measuring")
    parser.add_argument("--levels", type=int, default=16, help="metrics of a device (rest)")
    parser.add_argument("--down", type=float, default=2.0, help="seconds it stays killed (restart)")
    parser.add_argument("--work", type=Path, default=Path("/dev/shm"))
    arguments = parser.parse_args()
    arguments.agents = arguments.agents or _AGENTS[arguments.scenario]
    arguments.storm = arguments.storm or _STORM.get(arguments.scenario, 0)
    return arguments


if __name__ == "__main__":
    main()
