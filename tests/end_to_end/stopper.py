"""Stops a process (SIGSTOP) at a moment that soon passes.

    python stopper.py log LOG FROM PID TEXT UP_TO_S  # PID, once its log says TEXT
    python stopper.py child MODULE UP_TO_S PID...    # the first child of a PID that runs MODULE

A process of its own, because in the tests' the threads that make load would keep it waiting for
longer than what it waits for lasts. The first ends with what the log says from byte FROM until the
stop; the other says that it looks, and ends with the child's process id.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

_LOG_POLL_S = 0.001
_CHILD_POLL_S = 0.01  # a look goes through all processes of the machine


def at_words(log: Path, begin: int, pid: int, text: bytes, up_to_s: float) -> int:
    seen = b""
    with log.open("rb") as f:
        f.seek(begin)

        def said() -> bool:
            nonlocal seen
            seen += f.read()
            return text in seen

        if not _until(said, up_to_s, _LOG_POLL_S):
            return 1
        os.kill(pid, signal.SIGSTOP)
        seen += f.read()
    sys.stdout.buffer.write(seen)
    return 0


def at_child(module: str, up_to_s: float, parents: list[int]) -> int:
    found: list[psutil.Process] = []

    def begun() -> bool:
        for parent in map(psutil.Process, parents):
            found.extend(c for c in parent.children(recursive=True) if module in _command(c))
        return bool(found)

    print("looking", flush=True)
    if not _until(begun, up_to_s, _CHILD_POLL_S):
        return 1
    found[0].send_signal(signal.SIGSTOP)
    print(found[0].pid, flush=True)
    return 0


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # it has ended meanwhile
        return []


def _until(true: Callable[[], bool], up_to_s: float, poll_s: float) -> bool:
    deadline = time.monotonic() + up_to_s
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(poll_s)
    return True


if __name__ == "__main__":
    kind, *words = sys.argv[1:]
    if kind == "log":
        path, begin_at, process_id, text_of, seconds = words
        status = at_words(
            Path(path), int(begin_at), int(process_id), text_of.encode(), float(seconds)
        )
    else:
        name, seconds, *process_ids = words
        status = at_child(name, float(seconds), [int(p) for p in process_ids])
    sys.exit(status)
