"""Runs Remora's programs as a user would type them, and leaves none of them behind.

Owns processes, their logs and their end. Knows nothing of what they do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil

_BIN = Path(sys.executable).parent
_TAIL_BYTES = 4000
_GROUP_ENDS_S = 20.0  # after SIGKILL; a process in the kernel's hands takes longer


class DemoFailed(Exception):
    """Something did not do what the demo claims; the text says what."""


@dataclass(frozen=True)
class Finished:
    """A command that ended well."""

    argv: tuple[str, ...]
    stdout: str
    stderr: str
    seconds: float


@dataclass
class Daemon:
    """A program that runs until it is stopped, in a process group of its own."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def terminate(self, within_s: float = 20.0) -> int:
        """Asks it to end and waits; its exit status. Raises DemoFailed when it does not end."""
        if self.running:
            self.process.terminate()
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired as e:
            raise DemoFailed(f"{self.name} did not end within {within_s:.0f} s of SIGTERM") from e

    def kill(self) -> None:
        """Ends the whole group at once, whatever it is doing."""
        end_group(self.process)

    def tail(self) -> str:
        """The end of its log."""
        with self.log.open("rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return f.read().decode(errors="replace")


@dataclass
class Workshop:
    """A folder in which commands run. As a context manager it ends every daemon on the way out,
    also on Ctrl-C and SIGTERM."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    # Entered with each command that a spectator should see, for as long as it runs.
    showing: Callable[[Sequence[str]], AbstractContextManager[None]] = lambda _: nullcontext()
    daemons: list[Daemon] = field(default_factory=list)
    patience_s: float = 300.0  # for one command
    _commands: list[subprocess.Popen[str]] = field(default_factory=list)
    _interrupts: _Interrupts = field(default_factory=lambda: _Interrupts())

    def run(
        self,
        *argv: str,
        timeout_s: float | None = None,
        quiet: bool = False,
        secret: Mapping[str, str] | None = None,
    ) -> Finished:
        """Runs `remora… arguments` to its end, `secret` in its environment.

        Raises DemoFailed with its words if it fails."""
        shown = [*(f"{name}=…" for name in secret or {}), *argv]
        started = time.monotonic()
        with nullcontext() if quiet else self.showing(shown):
            done = self._finish(argv, timeout_s or self.patience_s, secret or {})
        if done.returncode != 0:
            words = (done.stderr or done.stdout).strip()[-_TAIL_BYTES:]
            raise DemoFailed(f"`{' '.join(argv)}` ended with {done.returncode}:\n{words}")
        return Finished(argv, done.stdout, done.stderr, time.monotonic() - started)

    def _finish(
        self, argv: Sequence[str], timeout_s: float, secret: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        with self._interrupts.held():
            command = subprocess.Popen(
                _resolved(argv),
                cwd=self.folder,
                env={**self._environment(), **secret},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            self._commands.append(command)
        try:
            stdout, stderr = command.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as e:
            raise DemoFailed(f"`{' '.join(argv)}` did not end within {timeout_s:.0f} s") from e
        self._commands.remove(command)
        return subprocess.CompletedProcess(argv, command.returncode, stdout, stderr)

    def start(self, name: str, *argv: str) -> Daemon:
        """Starts a program that stays; its output goes to logs/NAME.log."""
        with self.showing(argv):
            return self._start(name, argv)

    def _start(self, name: str, argv: Sequence[str]) -> Daemon:
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as output, self._interrupts.held():
            process = subprocess.Popen(
                _resolved(argv),
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            daemon = Daemon(name, process, log)
            self.daemons.append(daemon)
        return daemon

    def check_daemons(self) -> None:
        """Raises DemoFailed when one has ended by itself."""
        for daemon in self.daemons:
            if not daemon.running:
                raise DemoFailed(
                    f"{daemon.name} ended with {daemon.process.returncode}:\n{daemon.tail()}"
                )

    def _environment(self) -> Mapping[str, str]:
        return {**os.environ, **self.environment}

    def __enter__(self) -> Workshop:
        self._interrupts.take()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._commands:
            end_group(process)
        for daemon in self.daemons:
            daemon.kill()
        self._interrupts.give_back()


class _Interrupts:
    """Ctrl-C, SIGTERM and SIGHUP as KeyboardInterrupt, but never between the start of a process
    and the line that notes it: nobody would end that one."""

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self._holding = False
        self._came = False

    def take(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores
                self._before[number] = signal.signal(number, self._on_signal)

    def give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """What comes meanwhile is raised at the end."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._came:
            self._came = False
            raise KeyboardInterrupt

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._holding:
            raise KeyboardInterrupt
        self._came = True


def end_group(process: subprocess.Popen[Any]) -> None:
    """Ends a process and all of its group at once, whatever they are doing."""
    with contextlib.suppress(ProcessLookupError):  # it has ended, and so have its children
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _await_end_of_group(process.pid)
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def _await_end_of_group(group: int) -> None:
    """Its other processes are nobody's children here; they may write a moment longer."""
    deadline = time.monotonic() + _GROUP_ENDS_S
    while _lives_in(group) and time.monotonic() < deadline:
        time.sleep(0.01)


def _lives_in(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    # It also counts those that have ended and that nobody has waited for.
    return any(_is_alive_in(process, group) for process in psutil.process_iter())


def _is_alive_in(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def await_value(
    look: Callable[[], object], what: str, within_s: float, workshop: Workshop | None = None
) -> object:
    """The first truthy answer of `look`. Raises DemoFailed when none comes in time or a daemon
    of the workshop ends meanwhile."""
    deadline = time.monotonic() + within_s
    while True:
        found = look()
        if found:
            return found
        if workshop is not None:
            workshop.check_daemons()
        if time.monotonic() > deadline:
            raise DemoFailed(f"{what}: not within {within_s:.0f} s")
        time.sleep(0.05)


def _resolved(argv: Sequence[str]) -> list[str]:
    """The console scripts of this very installation; `python` is its interpreter."""
    program = sys.executable if argv[0] == "python" else str(_BIN / argv[0])
    return [program, *argv[1:]]
