"""A whole fleet on this machine: one controller and agents, each a process with its own state.

Owns the order in which they come up and how their addresses are learned. Every port is free and
on loopback. Knows nothing of models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.demo.processes import Daemon, DemoFailed, Workshop, await_value
from remora_agent.client import Client

_UP_S = 60.0
_AGENT_TOML = """\
state_dir = "{state}"

[labels]
{labels}

[serving]
listen = "127.0.0.1:0"
rows = 8
threads = 1

[telemetry]
interval_s = 1.0
metrics_listen = ""

[limits]
disk_floor_bytes = 67108864
{limits}"""


@dataclass
class Agent:
    name: str
    config: Path
    state: Path
    daemon: Daemon
    address: str = ""

    @contextmanager
    def client(self) -> Iterator[Client]:
        with Client(self.address, timeout_s=60.0) as client:
            yield client

    def events(self, name: str) -> list[dict[str, Any]]:
        """Its structured log lines with this event name."""
        return [line for line in log_lines(self.daemon.log) if line.get("event") == name]


@dataclass
class Fleet:
    workshop: Workshop
    home: str = "fleet"  # the controller's directory
    repository: str = "repository"
    sync_s: float = 2.0
    offline_after_s: float = 45.0
    agents: list[Agent] = field(default_factory=list)
    controller: Daemon | None = None
    ports: dict[str, str] = field(default_factory=dict)

    def init(self) -> None:
        """Makes the CA, and the operator's credentials for all later `remora` commands."""
        shop = self.workshop
        shop.run("remora-controller", "init", self.home, "--address", "127.0.0.1")
        config = shop.folder / self.home / "controller.toml"
        text = config.read_text()
        changes = {
            "sync_interval_s = 10.0": f"sync_interval_s = {self.sync_s}",
            "offline_after_s = 45.0": f"offline_after_s = {self.offline_after_s}",
        }
        for before, after in changes.items():
            if before not in text:
                raise DemoFailed(f"{config} has no line {before!r}")
            text = text.replace(before, after)
        config.write_text(text)
        shop.environment["REMORA_CREDENTIALS"] = str(shop.folder / self.home / "operator")

    def serve(self) -> None:
        """Starts the controller; again on the same ports after it was stopped or killed."""
        listening = self.workshop.folder / self.home / "listening.json"
        listening.unlink(missing_ok=True)
        if self.controller is not None:
            self.workshop.daemons.remove(self.controller)
        ports = {name: self.ports.get(name, "127.0.0.1:0") for name in ("fleet", "enrolment")}
        self.controller = self.workshop.start(
            "controller",
            *("remora-controller", "serve", self.home, "--repository", self.repository),
            *("--listen", ports["fleet"], "--enrol-listen", ports["enrolment"]),
            *("--metrics-listen", "127.0.0.1:0"),
        )
        await_value(listening.exists, "the controller's listening.json", _UP_S, self.workshop)
        found = json.loads(listening.read_text())
        self.ports = {k: f"127.0.0.1:{str(v).rpartition(':')[2]}" for k, v in found.items()}
        self.workshop.environment["REMORA_CONTROLLER"] = self.ports["fleet"]

    def join(self, name: str, *labels: str, download_bytes_per_s: int | None = None) -> Agent:
        """One more device: a one-time token, `join`, then `run` with a state directory of its
        own. Its address is known once it listens (`await_listening`)."""
        shop = self.workshop
        token = shop.run("remora", "devices", "token").stdout.strip()
        state, config = shop.folder / name, shop.folder / f"{name}.toml"
        config.write_text(agent_toml(state, labels, download_bytes_per_s))
        shop.run(
            *("remora-agent", "join", self.ports["enrolment"], "--state-dir", name),
            secret={"REMORA_JOIN_TOKEN": token},
        )
        agent = Agent(name, config, state, self._run_agent(name))
        self.agents.append(agent)
        return agent

    def stop(self, agent: Agent) -> None:
        """Ends an agent as its service manager does; `restart` brings it back."""
        status = agent.daemon.terminate()
        if status != 0:
            raise DemoFailed(f"{agent.name} ended with {status}:\n{agent.daemon.tail()}")
        self.workshop.daemons.remove(agent.daemon)

    def restart(self, agent: Agent) -> None:
        """Starts an agent again that was stopped or killed."""
        if agent.daemon in self.workshop.daemons:
            self.workshop.daemons.remove(agent.daemon)
        agent.daemon.log.write_bytes(b"")
        agent.daemon = self._run_agent(agent.name)
        self.await_listening(agent)

    def _run_agent(self, name: str) -> Daemon:
        return self.workshop.start(name, "remora-agent", "run", "--config", f"{name}.toml")

    def await_listening(self, agent: Agent) -> None:
        def address() -> str:
            found = agent.events("serving.listening")
            return str(found[-1]["address"]) if found else ""

        what = f"{agent.name}'s address"
        agent.address = str(await_value(address, what, _UP_S, self.workshop))

    def operator(self, *argv: str) -> Any:
        """`remora … --json`, decoded; not shown to the spectator."""
        return json.loads(self.workshop.run("remora", *argv, "--json", quiet=True).stdout)


def log_lines(log: Path) -> list[dict[str, Any]]:
    """The JSON objects of a structured log; other lines are left out."""
    lines = log.read_text(errors="replace").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def agent_toml(
    state: Path, labels: Sequence[str] = (), download_bytes_per_s: int | None = None
) -> str:
    """The text of an agent's configuration."""
    pairs = (label.split("=", 1) for label in labels)
    cap = download_bytes_per_s
    return _AGENT_TOML.format(
        state=state,
        labels="\n".join(f'{key} = "{value}"' for key, value in pairs),
        limits="" if cap is None else f"download_bytes_per_s = {cap}\n",
    )
