"""Keeps a real agent in a phase: by what an operator or an application may do where there is such a
thing (bandwidth, windows, locks, soak), else by stopping a process of it for a while, as a machine
that is out of breath would.

Each is a context manager: it gives the options for `remora rollout start`, and what it holds goes
on when the block ends.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path

import psutil

from examples.demo.fleet import Agent
from examples.demo.processes import DemoFailed, await_value
from tests.end_to_end.stage import Stage

BUILD_CHILD = "remora_agent.engine.build_child"
_PROBE_CHILD = "remora_agent.engine.probe_child"
_UP_TO_S = 60.0
_STOPPER = Path(__file__).with_name("stopper.py")


@dataclass
class Hold:
    """`options` start the rollout; `wait()` returns once the agent stands in the phase."""

    options: Sequence[str]
    wait: Callable[[], object]


Holding = Callable[[Stage, Agent], AbstractContextManager[Hold]]


@contextmanager
def slow_download(stage: Stage, agent: Agent) -> Iterator[Hold]:
    yield Hold(("--device-bandwidth", "8K"), _new_phase(agent, "STAGING"))


@contextmanager
def stopped_build(stage: Stage, agent: Agent) -> Iterator[Hold]:
    with stopped_child(BUILD_CHILD, agent) as wait:
        yield Hold((), wait)


@contextmanager
def stopped_proof(stage: Stage, agent: Agent) -> Iterator[Hold]:
    with stopped_child(_PROBE_CHILD, agent) as wait:
        yield Hold((), wait)


@contextmanager
def closed_window(stage: Stage, agent: Agent) -> Iterator[Hold]:
    """Opens in six hours: nothing but going back gets past it."""
    opens = datetime.now(timezone.utc) + timedelta(hours=6)
    window = f"{opens:%H:%M}-{opens + timedelta(hours=1):%H:%M}@UTC"
    yield Hold(("--window", window), _new_phase(agent, "WAIT_WINDOW"))


@contextmanager
def lock(stage: Stage, agent: Agent) -> Iterator[Hold]:
    address = ("--address", agent.address)
    stage.shop.run("remora-agent", "lock", "--for", "10m", "--reason", "it moves", *address)
    try:
        yield Hold((), _new_phase(agent, "WAIT_WINDOW"))
    finally:
        stage.shop.run("remora-agent", "unlock", *address)


@contextmanager
def stopped_switch(stage: Stage, agent: Agent) -> Iterator[Hold]:
    """The agent itself, in the fraction of a second in which the other engine is opened."""
    process = psutil.Process(agent.daemon.process.pid)
    begin = agent.daemon.log.stat().st_size
    words = ("log", agent.daemon.log, begin, process.pid, '"phase": "SWITCHING"', _UP_TO_S)
    command = [sys.executable, str(_STOPPER), *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as stopper:

        def wait() -> None:
            seen, _ = stopper.communicate()
            if stopper.returncode != 0:
                raise DemoFailed(f"{agent.name} did not begin to switch")
            if b'"phase": "SOAKING"' in seen:
                raise DemoFailed(f"{agent.name} had switched before it could be stopped")

        try:
            yield Hold((), wait)
        finally:
            stopper.kill()
            process.send_signal(signal.SIGCONT)


@contextmanager
def long_soak(stage: Stage, agent: Agent) -> Iterator[Hold]:
    # Longer than the command that aborts takes to begin on a machine that is out of breath.
    yield Hold(("--soak", "20"), _new_phase(agent, "SOAKING"))


def _new_phase(agent: Agent, phase: str) -> Callable[[], None]:
    """Waits until the agent says that it enters the phase, from now on."""
    before = _times_in(agent, phase)

    def wait() -> None:
        entered = partial(_entered, agent, phase, before)
        await_value(entered, f"{agent.name} in {phase}", _UP_TO_S)

    return wait


def _entered(agent: Agent, phase: str, before: int) -> bool:
    return _times_in(agent, phase) > before


def _times_in(agent: Agent, phase: str) -> int:
    return sum(line["phase"] == phase for line in agent.events("phase.changed"))


@contextmanager
def stopped_child(module: str, *agents: Agent) -> Iterator[Callable[[], psutil.Process]]:
    """Stops the first process of the module that one of the agents starts from now on; what is
    given waits for that. It goes on when the block ends."""
    parents = [str(agent.daemon.process.pid) for agent in agents]
    command = [sys.executable, str(_STOPPER), "child", module, str(_UP_TO_S), *parents]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stopper:
        assert stopper.stdout is not None and stopper.stdout.readline() == "looking\n"
        stopped: list[psutil.Process] = []

        def note() -> None:
            said = stopper.stdout.readline() if stopper.stdout is not None else ""
            with suppress(psutil.NoSuchProcess):
                stopped.extend([psutil.Process(int(said))] if said else [])

        def wait() -> psutil.Process:
            note()
            if not stopped:
                names = ", ".join(agent.name for agent in agents)
                raise DemoFailed(f"{names}: no {module} within {_UP_TO_S:.0f} s")
            return stopped[0]

        try:
            yield wait
        finally:
            stopper.kill()
            if not stopped:
                note()
            for process in stopped:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGCONT)
