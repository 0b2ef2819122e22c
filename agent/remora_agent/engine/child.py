"""Running a piece of engine work in a child process that may crash, hang or eat all memory.

The child reports over its own pipe, one JSON object a line:
    {"phase": str, "done": 0..1}            progress
    {"result": {...}}                       last, on success
    {"error": class name, "message": str}   last, on a deliberate error
Everything it or a native library prints goes to a log file whose end is quoted when it dies.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remora_agent.host import Progress
from remora_contract.errors import (
    Cancelled,
    EngineFault,
    Exhausted,
    Incompatible,
    Refused,
    RemoraError,
    all_errors,
)

_POLL_S = 0.1
_LOG_TAIL_LINES = 8
_LOG_TAIL_BYTES = 16 << 10
_MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class ChildLimits:
    """What a child may take. Memory is anonymous memory: mapped files can be dropped again."""

    wall_s: float = 3600.0
    memory_bytes: int | None = None  # None: unlimited


@dataclass
class _Report:
    """What the child has said so far."""

    phase: str = "starting"
    done: float = 0.0
    result: dict[str, Any] | None = None
    error: RemoraError | None = None
    pending: bytearray = field(default_factory=bytearray)


def run_child(
    module: str,
    arguments: Sequence[str],
    what: str,
    log_path: Path,
    limits: ChildLimits,
    progress: Progress,
    cancelled: Callable[[], bool],
) -> dict[str, Any]:
    """Runs `python -m module arguments` to its end and returns its result.

    `what` names the work in errors. `progress` is called several times a second, also while the
    child says nothing; what it raises ends the child. Raises the child's own deliberate error,
    Exhausted (time or memory), Cancelled, EngineFault (killed by a signal, or an exit without a
    result; the log's last lines are quoted).
    """
    read_end, write_end = os.pipe()
    with log_path.open("wb") as log_file:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(write_end), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            pass_fds=(write_end,),
            start_new_session=True,
        )
    os.close(write_end)
    report = _Report()
    try:
        _watch(process, read_end, report, what, limits, progress, cancelled)
    finally:
        os.close(read_end)
        _kill(process)
    return _conclude(process.returncode, report, what, log_path)


def _watch(
    process: subprocess.Popen[bytes],
    read_end: int,
    report: _Report,
    what: str,
    limits: ChildLimits,
    progress: Progress,
    cancelled: Callable[[], bool],
) -> None:
    """Follows the child until it closes its pipe. Raises when it must not go on."""
    started = time.monotonic()
    os.set_blocking(read_end, False)
    with selectors.DefaultSelector() as selector:
        selector.register(read_end, selectors.EVENT_READ)
        while True:
            if selector.select(_POLL_S):
                data = os.read(read_end, 1 << 16)
                if not data:
                    break
                _take(report, data, progress)
            else:
                # Nothing new; but whoever waits says through `progress` that it is not wanted any
                # more, and a child may be silent for minutes, or hang.
                progress(report.phase, report.done)
            if cancelled():
                raise Cancelled(f"{what} was cancelled while {report.phase}")
            _check_limits(process.pid, report.phase, what, limits, time.monotonic() - started)
    try:
        process.wait(timeout=max(limits.wall_s - (time.monotonic() - started), 1.0))
    except subprocess.TimeoutExpired as e:
        raise _too_long(what, report.phase, limits) from e


def _check_limits(pid: int, phase: str, what: str, limits: ChildLimits, elapsed_s: float) -> None:
    if elapsed_s > limits.wall_s:
        raise _too_long(what, phase, limits)
    if limits.memory_bytes is not None and (used := anonymous_bytes(pid)) > limits.memory_bytes:
        raise Exhausted(
            f"{what} took {used >> 20} MiB while {phase}, more than its limit of "
            f"{limits.memory_bytes >> 20} MiB; build on a larger device or raise the limit"
        )


def _too_long(what: str, phase: str, limits: ChildLimits) -> Exhausted:
    return Exhausted(
        f"{what} was still {phase} after its time limit of {limits.wall_s:.0f} s; raise the limit"
    )


def _take(report: _Report, data: bytes, progress: Progress) -> None:
    report.pending += data
    if len(report.pending) > _MAX_LINE_BYTES:
        raise EngineFault(f"the child process sent a line longer than {_MAX_LINE_BYTES} bytes")
    *lines, rest = bytes(report.pending).split(b"\n")
    report.pending = bytearray(rest)
    for line in lines:
        message = json.loads(line)
        if "phase" in message:
            report.phase, report.done = message["phase"], float(message["done"])
            progress(report.phase, report.done)
        elif "result" in message:
            report.result = message["result"]
        else:
            report.error = _error(message["error"], message["message"])


def _error(name: str, message: str) -> RemoraError:
    known = {cls.__name__: cls for cls in all_errors()}
    if name == Incompatible.__name__:  # made from refusals, of which only the text travelled
        return Refused(message)
    return known.get(name, EngineFault)(message)


def _conclude(returncode: int, report: _Report, what: str, log_path: Path) -> dict[str, Any]:
    if report.error is not None:
        raise report.error
    if returncode == 0 and report.result is not None:
        return report.result
    if returncode < 0:
        ending = f"was killed by {_signal_name(-returncode)}"
        if -returncode == signal.SIGKILL:
            ending += " (by the kernel, if memory ran out: `journalctl -k` says so)"
    else:
        ending = f"exited with status {returncode} and no result"
    raise EngineFault(f"{what} {ending} while {report.phase}; its last words: {log_tail(log_path)}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends the child and whatever it started, if it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def log_tail(path: Path) -> str:
    """The last lines of a log on one line."""
    with path.open("rb") as f:
        f.seek(max(0, path.stat().st_size - _LOG_TAIL_BYTES))
        text = f.read().decode(errors="replace")
    lines = deque((line.strip() for line in text.splitlines() if line.strip()), _LOG_TAIL_LINES)
    return " | ".join(lines) or "(nothing)"


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that no file backs; 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0
