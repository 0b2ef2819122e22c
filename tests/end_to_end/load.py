"""Clients that ask again and again while something changes underneath, and what they heard.

Owns the threads and the record. What an answer has to be is the caller's matter; that there is one
is `complaints`.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from examples.demo.fleet import Agent
from remora_agent.client import Client, Result
from remora_contract.errors import RemoraError

_PAUSE_S = 0.05  # the processor is not the matter here, and others want it too


@dataclass(frozen=True)
class Heard:
    agent: str
    began_s: float
    result: Result | None
    error: str | None


@dataclass
class Load:
    """As a context manager: one client at each agent goes through `asks` (arguments of
    `Client.generate`) again and again, from entry to exit."""

    agents: Sequence[Agent]
    asks: Sequence[Mapping[str, Any]]
    heard: list[Heard] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(agent,), daemon=True) for agent in self.agents
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def of(self, agent: Agent) -> list[Result]:
        """Its answers in the order in which they were asked for."""
        mine = sorted((h for h in self.heard if h.agent == agent.name), key=lambda h: h.began_s)
        return [h.result for h in mine if h.result is not None]

    def seconds(self) -> float:
        """For how long every agent has been answering."""
        began = [[h.began_s for h in self.heard if h.agent == a.name] for a in self.agents]
        return min(max(times) - min(times) if times else 0.0 for times in began)

    def complaints(self) -> list[str]:
        """Requests that were not answered."""
        return [f"{h.agent}: {h.error}" for h in self.heard if h.error is not None]

    def _ask(self, agent: Agent) -> None:
        with agent.client() as client:
            for ask in itertools.cycle(self.asks):
                self.heard.append(_heard(client, agent.name, ask))
                if self._stop.wait(_PAUSE_S):
                    return


def _heard(client: Client, agent: str, ask: Mapping[str, Any]) -> Heard:
    began_s = time.monotonic()
    try:
        return Heard(agent, began_s, client.generate(**ask), None)
    except RemoraError as e:
        return Heard(agent, began_s, None, f"{type(e).__name__}: {e}")
