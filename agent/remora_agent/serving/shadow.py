"""A candidate answers what its incumbent has answered, on spare capacity, to be compared with it.

Which requests are compared, a bounded queue of them, and the counts of what became of each:
offered = compared + skipped + cancelled + failed + those that wait or run. Prompts and answers stay
in memory until then, are told nobody, and are gone.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace

from remora_agent.runtime.api import (
    Delta,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    OnEvent,
    PromptScored,
)
from remora_agent.runtime.constraint import Grammar
from remora_agent.runtime.model import Model
from remora_agent.runtime.spare import SpareRequest
from remora_agent.serving.call import GenerateCall
from remora_agent.serving.experiment_counts import ExperimentCounts
from remora_agent.serving.experiments import Assigned
from remora_agent.serving.shadow_task import NEXT, Resolve, ShadowTask, Stage, ran, refs
from remora_contract.errors import Exhausted, NotFound, Unavailable
from remora_contract.experiments import SHADOW_PREFIX, is_compared

MAX_TASKS = 4  # that wait; the oldest makes room
_ID = "\x00shadow"  # no caller's: those are printable


class ShadowRunner:
    """Of one model. `next`, `close` and what is heard are its step thread's, the rest any's: a call
    may move to another model, whose thread then tells how it ended."""

    def __init__(
        self,
        runtime: Model,
        counts: ExperimentCounts,
        resolve: Resolve,
        seed: Callable[[], int] = lambda: random.getrandbits(64),
    ) -> None:
        """`resolve` an arm's selection to adapters; `seed` for requests that name none."""
        self._runtime, self._counts = runtime, counts
        self._resolve, self._seed = resolve, seed
        self._running: ShadowTask | None = None
        self._lock = threading.Lock()  # guards the next two
        self._waiting: deque[ShadowTask] = deque()
        self._closed = False
        self._numbers = itertools.count(1)
        runtime.spare_work(self)

    def wants(self, arm: Assigned | None, request_id: str) -> bool:
        """Whether an answer of this arm is to be compared."""
        shadow = None if arm is None else arm.declared.experiment.shadow
        if arm is None or shadow is None or shadow.incumbent != arm.arm.name:
            return False
        return is_compared(arm.declared.experiment, request_id)

    def seeded(self, call: GenerateCall) -> GenerateCall:
        """With a seed, so that both answers can be drawn alike."""
        if call.sampling.seed is not None:
            return call
        return replace(call, sampling=replace(call.sampling, seed=self._seed()))

    def listening(
        self, arm: Assigned, request: GenerationRequest, grammar: Grammar | None, on_event: OnEvent
    ) -> OnEvent:
        """`on_event` before a listener that remembers the answer's tokens and has it compared."""
        shadow = arm.declared.experiment.shadow
        assert shadow is not None  # `wants` said so
        tokens: list[int] = []

        def listen(event: Event) -> None:
            on_event(event)
            if isinstance(event, Delta):
                tokens.extend(event.token_ids)
            elif isinstance(event, Finished) and event.reason is not FinishReason.CANCELLED:
                task = ShadowTask(
                    arm.declared, shadow, request, refs(event), grammar, tuple(tokens)
                )
                self._offer(task, event)

        return listen

    # -- what the runtime asks and says -------------------------------------------------------

    def next(self) -> SpareRequest | None:
        """The next stage of the task that runs, else the first of the newest that waits."""
        while (task := self._running or self._newest()) is not None:
            self._running = task
            found = self._asking(task)
            if found is not None:
                return found
        return None

    def close(self) -> None:
        with self._lock:
            self._closed = True
            left, self._waiting = self._waiting, deque()
        for task in (*left, self._running):
            if task is not None:
                self._drop(task, "cancelled")

    # -- inside ---------------------------------------------------------------------------------

    def _offer(self, task: ShadowTask, answered: Finished) -> None:
        """What another model answered, after a switch, is not this one's to compare; nor is what
        somebody's names made of the arm."""
        self._count(task, {"offered": 1})
        left: ShadowTask | None = task
        if task.answer and ran(task.incumbent, answered):
            left = self._put(task)
        if left is not None:
            self._count(left, {"skipped": 1})

    def _put(self, task: ShadowTask) -> ShadowTask | None:
        """Which one makes room, if any has to."""
        with self._lock:
            if self._closed:
                return task
            self._waiting.append(task)
            return self._waiting.popleft() if len(self._waiting) > MAX_TASKS else None

    def _newest(self) -> ShadowTask | None:
        with self._lock:
            return self._waiting.pop() if self._waiting else None

    def _asking(self, task: ShadowTask) -> SpareRequest | None:
        """None where what declared it, or an adapter, is gone; the task is gone then."""
        directory = self._runtime.adapters.directory
        name = f"{_ID}-{next(self._numbers)}"
        try:
            if directory.experiment(task.declared.experiment.name) != task.declared:
                raise NotFound("the experiment is another now")
            context = self._runtime.status().context_tokens
            request, grammar = task.asking(name, self._resolve, context)
        except NotFound:
            self._drop(task, "cancelled")
            return None
        return request, lambda event: self._hear(task, event), grammar

    def _hear(self, task: ShadowTask, event: Event) -> None:
        if isinstance(event, Delta) and task.stage is Stage.ANSWER:
            task.rival.extend(event.token_ids)
        elif isinstance(event, PromptScored):
            task.scores[task.stage] = event.logprobs
        elif isinstance(event, Failed):
            self._drop(task, _why(event))
        elif isinstance(event, Finished):
            self._finished(task, event)

    def _finished(self, task: ShadowTask, answered: Finished) -> None:
        if answered.reason is FinishReason.CANCELLED:
            self._drop(task, "cancelled")
        elif not ran(task.asked_arm, answered):
            self._drop(task, "skipped")
        elif (after := NEXT[task.stage]) is not None:
            task.stage = after
        else:
            self._count(task, task.compared())
            self._running = None

    def _drop(self, task: ShadowTask, why: str) -> None:
        self._count(task, {why: 1})
        self._running = None

    def _count(self, task: ShadowTask, more: Mapping[str, float]) -> None:
        named = {SHADOW_PREFIX + name: value for name, value in more.items()}
        self._counts.add(task.candidate, named)


def _why(failed: Failed) -> str:
    if isinstance(failed.error, Exhausted):
        return "skipped"  # there was no room
    return "cancelled" if isinstance(failed.error, NotFound | Unavailable) else "failed"
