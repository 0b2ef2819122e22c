"""The agent's end of the process that runs TensorRT Edge-LLM (`child_side`): opened, asked one
question at a time, cancelled, ended. A crash of it is an EngineFault here and nothing more.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from remora_agent.edgellm.lines import MAX_LINE_BYTES, line_of, parse
from remora_agent.edgellm.request import Question
from remora_contract.errors import EngineFault, RemoraError, all_errors

_CHILD = "remora_agent.edgellm.child_side"
_POLL_S = 0.1
_END_S = 5.0
_LOG_BYTES = 2000


@dataclass(frozen=True)
class Patience:
    """Seconds without a word after which the process is killed."""

    open_s: float = 600.0  # a large engine from a slow disk
    silent_s: float = 120.0  # between two chunks of an answer


@dataclass(frozen=True)
class End:
    reason: str
    prompt_tokens: int


OnChunk = Callable[[str, tuple[int, ...]], None]


class Child:
    """One thread asks; `cancel` and `heard_s` are any thread's."""

    def __init__(
        self,
        engine_directory: Path,
        adapters: dict[str, Path],
        patience: Patience,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """Waits until the engine is open; what `while_waiting` raises ends it. Raises what the
        child says (Unsupported, EngineFault), EngineFault when it dies or is silent too long."""
        self._patience = patience
        self._folder = tempfile.TemporaryDirectory(prefix="remora-edgellm-")
        folder = Path(self._folder.name)
        task = folder / "task.json"
        files = {key: str(path) for key, path in adapters.items()}
        task.write_text(json.dumps({"engine_directory": str(engine_directory), "adapters": files}))
        self._log = folder / "log"
        self._writing = threading.Lock()
        self._pending = bytearray()
        self._heard_s = time.monotonic()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _CHILD, str(task)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._expect("ready", self._next(patience.open_s, "opening the engine", while_waiting))
        except BaseException:
            self.close()
            raise

    @property
    def silent_s(self) -> float:
        """Since it last said something, or was asked."""
        return time.monotonic() - self._heard_s

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, question: Question, on_chunk: OnChunk, while_waiting: Callable[[], None]) -> End:
        """Blocking; `while_waiting` is called several times a second. Raises what the child
        says, EngineFault when it dies or stands still; it is closed then."""
        self._heard_s = time.monotonic()
        try:
            self._send({"do": "generate", "question": asdict(question)})
            while True:
                said = self._next(self._patience.silent_s, "answering", while_waiting)
                if said["say"] == "chunk":
                    on_chunk(str(said["text"]), tuple(int(i) for i in said["ids"]))
                    continue
                self._expect("end", said)
                return End(str(said["reason"]), int(said["prompt_tokens"]))
        except EngineFault:
            if not self.alive or self.silent_s >= self._patience.silent_s:
                self.close()
            raise

    def cancel(self) -> None:
        """The answer that runs ends soon."""
        if self.alive:
            self._send({"do": "cancel"})

    def kill(self) -> None:
        """Whoever asks it hears that it ended."""
        self._process.kill()

    def close(self) -> None:
        """A second call does nothing."""
        process = self._process
        if process.stdin is not None and not process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):  # it has ended
                process.stdin.close()  # it then ends by itself
        try:
            process.wait(_END_S if process.poll() is None else 0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        self._folder.cleanup()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            with self._writing:
                self._process.stdin.write(line_of(message))
                self._process.stdin.flush()
        except (BrokenPipeError, ValueError) as e:
            raise self._died("it takes no more requests") from e

    def _expect(self, what: str, said: dict[str, Any]) -> None:
        """Raises the error that came instead."""
        if said["say"] == "error":
            raise _error(str(said["error"]), str(said["message"]))
        if said["say"] != what:
            raise EngineFault(f"the Edge-LLM process said {said['say']!r} instead of {what!r}")

    def _next(
        self, patience_s: float, doing: str, while_waiting: Callable[[], None]
    ) -> dict[str, Any]:
        """Its next line."""
        stdout = self._process.stdout
        assert stdout is not None
        until = time.monotonic() + patience_s
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                while_waiting()
                if time.monotonic() >= until:
                    self._process.kill()
                    raise EngineFault(
                        f"the Edge-LLM process said nothing for {patience_s:g} s while {doing}; it "
                        f"was killed.{self._last_words()}"
                    )
                if selector.select(_POLL_S):
                    data = os.read(stdout.fileno(), 1 << 16)
                    if not data or len(self._pending) > MAX_LINE_BYTES:
                        raise self._died(doing)
                    self._pending += data
        self._heard_s = time.monotonic()
        line, _, rest = self._pending.partition(b"\n")
        self._pending = bytearray(rest)
        try:
            return parse(bytes(line) + b"\n")
        except ValueError as e:
            raise EngineFault(f"the Edge-LLM process said {bytes(line[:80])!r}: {e}") from e

    def _died(self, doing: str) -> EngineFault:
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        how = f"signal {-code}" if code < 0 else f"status {code}"
        return EngineFault(f"the Edge-LLM process ended ({how}): {doing}.{self._last_words()}")

    def _last_words(self) -> str:
        try:
            text = self._log.read_bytes()[-_LOG_BYTES:].decode(errors="replace").strip()
        except FileNotFoundError:
            return ""
        return f" Its last words: {text}" if text else ""


def _error(name: str, message: str) -> RemoraError:
    for kind in all_errors():
        if kind.__name__ == name and kind.__init__ is RemoraError.__init__:
            return kind(message)
    return EngineFault(f"{name}: {message}")
