"""Runs a batch file's requests on a model, at most `batch_size` at a time, mixed adapters and all.

Every request gets an outcome: an answer or the error that kept it from one. Knows no files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from remora_agent.batch.document import BatchDocument, call_of
from remora_agent.runtime.api import Delta, Event, Failed, Finished, TokenLogprob
from remora_agent.serving.served_model import ServedModel
from remora_contract.errors import RemoraError

OnDone = Callable[[int], None]


@dataclass
class Outcome:
    """`finished` or `error` is set once the request has ended."""

    index: int
    rendered: str = ""  # what was tokenised
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finished: Finished | None = None
    error: RemoraError | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)


def run_batch(
    model: ServedModel, document: BatchDocument, seed: int | None, on_done: OnDone = lambda n: None
) -> list[Outcome]:
    """Blocking. `on_done` hears how many have ended, in this thread: what it raises is raised here.
    What one request does stops no other."""
    runner = _Runner(model, document, seed, on_done)
    for index in range(len(document.requests)):
        runner.start(index)
    return runner.wait()


class _Runner:
    def __init__(
        self, model: ServedModel, document: BatchDocument, seed: int | None, on_done: OnDone
    ) -> None:
        self._model = model
        self._document = document
        self._seed = seed
        self._on_done = on_done
        # More than rows, so that one is ready when a row becomes free; never more than asked for,
        # nor than may wait before the first has a row.
        ready = min(2 * model.runtime.status().rows, model.runtime.options.max_waiting)
        self._places_total = min(document.settings.batch_size, ready)
        self._places = threading.Semaphore(self._places_total)
        self._lock = threading.Lock()
        self._done = self._told = 0
        self._outcomes: list[Outcome] = []

    def start(self, index: int) -> None:
        """Waits for a place, then submits request `index`."""
        outcome = Outcome(index)
        self._outcomes.append(outcome)
        self._wait_for_place()
        try:
            call = call_of(self._document, index, self._seed)
            encoded = self._model.encode(call.prompt)
            outcome.rendered = encoded.text
            request_id = call.request_id or f"batch-{index}"
            self._model.submit(
                request_id, call, encoded.token_ids, None, lambda e: self._hear(outcome, e)
            )
        except RemoraError as e:
            self._hear(outcome, Failed(e))

    def wait(self) -> list[Outcome]:
        for _ in range(self._places_total):
            self._wait_for_place()
        return self._outcomes

    def _wait_for_place(self) -> None:
        self._places.acquire()
        with self._lock:
            told, self._told = self._told, self._done
        if self._told > told:
            self._on_done(self._told)

    def _hear(self, outcome: Outcome, event: Event) -> None:
        if isinstance(event, Delta):
            outcome.texts.append(event.text)
            outcome.logprobs.extend(event.logprobs)
        elif isinstance(event, (Finished, Failed)):
            if isinstance(event, Finished):
                outcome.finished = event
            else:
                outcome.error = event.error
            with self._lock:
                self._done += 1
            self._places.release()
