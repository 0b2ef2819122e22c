"""Clients that never stop asking while releases are switched, and a check of every answer."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from remora_agent.client import Client, Result
from remora_contract.errors import RemoraError

TOKENS = 6
OPTIONS: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 0.0}


@dataclass
class Load:
    """`choices` are the adapter selections the clients cycle through."""

    address: str
    choices: list[dict[str, Any]]
    clients: int = 4
    answers: list[tuple[str, dict[str, Any], Result]] = field(default_factory=list)
    failures: list[RemoraError] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(self.clients)]
        for thread in self._threads:
            thread.start()
        self.wait_answers(self.clients)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_answers(self, more: int) -> None:
        """Until this many more have come, so that a switch has load before and after it."""
        with self._changed:
            wanted = len(self.answers) + more
            assert self._changed.wait_for(
                lambda: len(self.answers) >= wanted or self.failures, 30
            ), "the load stands still"
            assert not self.failures, self.failures

    def check(self, solo: Callable[[str, Result], tuple[int, ...]]) -> None:
        """Every request was answered, with the tokens of exactly the bytes it names."""
        assert not self.failures, self.failures
        for prompt, _, result in self.answers:
            assert result.token_ids == solo(prompt, result), (prompt, result.provenance)

    def _ask(self, number: int) -> None:
        with Client(self.address, timeout_s=30) as client:
            for i in itertools.count():
                if self._stop.is_set():
                    return
                prompt, choice = f"{number} {i}", self.choices[(number + i) % len(self.choices)]
                try:
                    answer = self._answer(client, prompt, choice, streamed=i % 2 == 0)
                except RemoraError as e:
                    with self._changed:
                        self.failures.append(e)
                        self._changed.notify_all()
                    return
                with self._changed:
                    self.answers.append((prompt, choice, answer))
                    self._changed.notify_all()

    @staticmethod
    def _answer(client: Client, prompt: str, choice: dict[str, Any], *, streamed: bool) -> Result:
        if not streamed:
            return client.generate(prompt, **choice, **OPTIONS)
        stream = client.stream(prompt, **choice, **OPTIONS)
        text = "".join(d.text for d in stream)
        assert stream.result.text == text
        return stream.result
