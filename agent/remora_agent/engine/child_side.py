"""The child's end of `engine.child`: reporting progress, a result, or a deliberate error."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from remora_agent.engine.disk import disk_error
from remora_agent.host import Progress
from remora_contract.errors import RemoraError

_PR_SET_PDEATHSIG = 1
# Building and proving happen beside an engine that serves: requests go first.
_NICENESS = 10
# What the kernel kills first when memory runs out: the work, not the agent that serves.
_OOM_SCORE_ADJ = 500


def child_main(descriptor: int, work: Callable[[Progress], dict[str, Any]]) -> int:
    """Runs `work` and reports it to the parent; the exit status.

    An unexpected exception is left to end the process: its traceback is in the log.
    """
    die_with_parent(descriptor)
    os.nice(_NICENESS)
    _offer_to_the_oom_killer()

    def send(message: dict[str, Any]) -> None:
        os.write(descriptor, json.dumps(message).encode() + b"\n")

    def progress(phase: str, done: float) -> None:
        send({"phase": phase, "done": round(done, 4)})

    try:
        send({"result": work(progress)})
    except RemoraError as e:
        send({"error": type(e).__name__, "message": str(e)})
        return 1
    except OSError as e:
        error = disk_error(Path(str(e.filename or "the engine cache")), e)
        send({"error": type(error).__name__, "message": str(error)})
        return 1
    return 0


def die_with_parent(descriptor: int) -> None:
    """A child must not outlive the agent that asked for it, nor begin without it. `descriptor`: a
    pipe that only the agent reads."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # The kernel tells of no end that came before that call; but nobody reads the pipe any more.
    pipe = select.poll()
    pipe.register(descriptor, 0)
    if pipe.poll(0):
        sys.exit("the agent that asked for this has ended")


def _offer_to_the_oom_killer() -> None:
    """Every process may make itself more likely to be chosen, none less."""
    path = Path("/proc/self/oom_score_adj")
    path.write_text(str(max(_OOM_SCORE_ADJ, int(path.read_text()))))
