"""The thread that owns TensorRT Edge-LLM's process: one answer after another, and restarts.

An adapter that the runtime was not opened with restarts it while requests wait. Where it does not
open with a new adapter it is opened as it was before; where it does not open even so, the model has
failed. A crash costs the request that ran.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from remora_agent.bank.directory import AdapterDirectory, Registered
from remora_agent.edgellm.answering import Answering
from remora_agent.edgellm.bundle import EdgeBundle
from remora_agent.edgellm.child import Child, Patience
from remora_agent.edgellm.convert import write_adapter
from remora_agent.edgellm.loaded import LoadedAdapters, key_of
from remora_agent.edgellm.pending import Pending, Waiting
from remora_agent.edgellm.request import Question, question
from remora_agent.runtime.api import Accepted, Failed, Finished
from remora_agent.runtime.metrics import RuntimeMetrics
from remora_agent.runtime.step_loop import wait_for
from remora_contract.digests import hex_of
from remora_contract.errors import DeadlineExceeded, Exhausted, RemoraError, Unavailable

log = logging.getLogger(__name__)
_WAIT_S = 0.1
_END_S = 5.0  # an answer gets to end when the model is closed


class Worker:
    """`start` opens the runtime. Thread-safe but for `start` and `close`."""

    def __init__(
        self,
        opened: EdgeBundle,
        directory: AdapterDirectory,
        pending: Pending,
        loaded: LoadedAdapters,
        metrics: RuntimeMetrics,
        clock: Callable[[], float],
        patience: Patience,
    ) -> None:
        self._opened, self._directory = opened, directory
        self._pending, self._loaded = pending, loaded
        self._metrics, self._clock, self._patience = metrics, clock, patience
        self._folder = tempfile.TemporaryDirectory(prefix="remora-edgellm-adapters-")
        self._coming: deque[tuple[Registered, Future[None]]] = deque()
        self._child: Child | None = None
        self._thread = threading.Thread(target=self._run, name="remora-edgellm", daemon=True)
        self._ending = False
        self._beat_s = clock()
        self.failed = False
        self.restarts = 0

    def start(self) -> None:
        """With what the directory knows. Raises as `Child`, and what converting raises."""
        try:
            files = self._with_new({})
            self._child = self._open(files)
            self._loaded.became(files)
        except BaseException:
            self._folder.cleanup()
            raise
        self._thread.start()

    def close(self, error: RemoraError) -> None:
        """What waits fails with it, what runs is cancelled."""
        self._ending = True
        self._pending.refuse(error)
        self._fail_waiting(error)
        self._thread.join()
        if self._child is not None:
            self._child.close()
        self._folder.cleanup()

    def heartbeat_age_s(self) -> float:
        """Since the thread last moved: it looks around while it waits for the process too."""
        return self._clock() - self._beat_s

    def probe(self) -> None:
        """Before any request. Raises EngineFault."""
        assert self._child is not None
        self._opened.answer_of(self._child, self._opened.probe_prompt, "", 1)

    def bring_in(self, record: Registered, timeout_s: float) -> None:
        """Waits until the runtime is open with it. Raises what opening raises, Unavailable."""
        done: Future[None] = Future()
        with self._pending.changed:
            if self._ending or self.failed:
                raise Unavailable("the runtime has ended")
            self._coming.append((record, done))
            self._pending.changed.notify_all()
        wait_for(done, max(timeout_s, self._patience.open_s))

    def lease(self, waiting: Waiting, by: int) -> None:
        if waiting.adapter is not None:
            self._loaded.lease(waiting.adapter.digest, by)

    def leave(self, waiting: Waiting, end: Finished | Failed) -> None:
        """Ends one that has not begun."""
        self.lease(waiting, -1)
        self._metrics.ended(failed=isinstance(end, Failed))
        waiting.on_event(Accepted(waiting.id, waiting.provenance))
        waiting.on_event(end)

    # -- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._ending:
                self._look_around()
                self._let_in()
                waiting = self._pending.next()
                if waiting is None:
                    with self._pending.changed:
                        if not len(self._pending) and not self._coming and not self._ending:
                            self._pending.changed.wait(_WAIT_S)
                    continue
                try:
                    self._answer(waiting)
                finally:
                    self.lease(waiting, -1)
                    self._pending.ended()
        except RemoraError as e:
            log.error("edgellm.failed", extra={"why": str(e)})
            self.failed = True
            self._pending.refuse(Unavailable(f"TensorRT Edge-LLM's runtime has failed: {e}"))
            self._fail_waiting(e)
        finally:
            self._fail_coming(Unavailable("the runtime has ended"))

    def _look_around(self) -> None:
        self._beat_s = self._clock()
        for late in self._pending.take_late(self._beat_s):
            self.leave(late, Failed(DeadlineExceeded("the deadline passed while it waited")))

    def _answer(self, waiting: Waiting) -> None:
        """Raises only where the runtime does not open any more."""
        answering = Answering(waiting, self._metrics, self._clock)
        try:
            child = self._with(waiting.adapter)
        except RemoraError as e:
            answering.fail(e)
            if self._child is None:
                raise
            return
        told_s: float | None = None

        def look() -> None:
            nonlocal told_s
            self._look_around()
            answering.check_deadline()
            if told_s is None and (answering.over or self._ending):
                told_s = self._clock()
                child.cancel()
            if told_s is not None and self._ending and self._clock() - told_s > _END_S:
                child.kill()

        try:
            end = child.ask(self._question(waiting), answering.chunk, look)
        except RemoraError as e:
            answering.fail(e)
        else:
            answering.end(end.reason, len(waiting.request.prompt))
        if not child.alive and not self._ending:
            log.error("edgellm.died", extra={"request": waiting.id})
            self._reopen()

    def _question(self, waiting: Waiting) -> Question:
        text = self._opened.text.decode(waiting.request.prompt, keep_special_tokens=True)
        key = "" if waiting.adapter is None else key_of(waiting.adapter.digest)
        room = self._opened.context - len(waiting.request.prompt)
        return question(waiting.request, text, self._opened.bos, key, room)

    def _let_in(self) -> None:
        """Adapters that a release or an operator waits for."""
        while self._coming:
            record, done = self._coming.popleft()
            try:
                self._with(record)
            except RemoraError as e:
                done.set_exception(e)
                if self._child is None:
                    raise
            else:
                done.set_result(None)

    def _with(self, adapter: Registered | None) -> Child:
        """The process, restarted where it does not have the adapter. Raises what converting and
        opening raise; the process is then as before, or there is none."""
        assert self._child is not None
        if adapter is None or self._loaded.holds(adapter.digest):
            return self._child
        self._loaded.seen.add(adapter.digest)
        files = self._with_new(
            self._loaded.with_one_more(self._loaded.files, adapter, self._converted(adapter))
        )
        started = self._clock()
        old, self._child = self._child, None
        old.close()
        try:
            self._child = self._open(files)
        except RemoraError:
            self._reopen()
            raise
        self._loaded.became(files)
        self.restarts += 1
        seconds = round(self._clock() - started, 3)
        log.info("edgellm.restarted", extra={"adapter": adapter.name, "seconds": seconds})
        return self._child

    def _with_new(self, files: dict[str, Path]) -> dict[str, Path]:
        """And what was registered since the last time: a release brings several, and all of them
        come in by one restart. One for which there is no room comes in when it is asked for."""
        for record in self._directory.revisions():
            if record.digest in self._loaded.seen:
                continue
            self._loaded.seen.add(record.digest)
            try:
                files = self._loaded.with_one_more(files, record, self._converted(record))
            except Exhausted as e:
                log.warning("adapter.not_preloaded", extra={"adapter": record.name, "why": str(e)})
        return files

    def _converted(self, adapter: Registered) -> Path:
        path = Path(self._folder.name) / f"{hex_of(adapter.digest)}.safetensors"
        return write_adapter(adapter.directory, self._opened.bundle, path)

    def _reopen(self) -> None:
        """As it was. Raises where that fails; there is no process then."""
        old, self._child = self._child, None
        if old is not None:
            old.close()
        self._child = self._open(self._loaded.files)
        self.restarts += 1

    def _open(self, files: dict[str, Path]) -> Child:
        named = {key_of(digest): path for digest, path in files.items()}

        def look() -> None:
            self._look_around()
            if self._ending:
                raise Unavailable("the runtime has ended")

        return Child(self._opened.engine_directory, named, self._patience, look)

    def _fail_waiting(self, error: RemoraError) -> None:
        for waiting in self._pending.take_all():
            self.leave(waiting, Failed(error))

    def _fail_coming(self, error: RemoraError) -> None:
        with self._pending.changed:
            self._ending = True
        while self._coming:
            self._coming.popleft()[1].set_exception(error)
