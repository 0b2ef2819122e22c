"""python stopper.py LOG FROM PID TEXT UP_TO_S: stops a process the moment its log says TEXT.

A process of its own, because in the tests' the threads that make load would keep it waiting for
longer than what it waits for lasts. Ends with what the log says from byte FROM until the stop.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

_POLL_S = 0.001


def main(log: Path, begin: int, pid: int, text: bytes, up_to_s: float) -> int:
    deadline, seen = time.monotonic() + up_to_s, b""
    with log.open("rb") as f:
        f.seek(begin)
        while text not in seen:
            if time.monotonic() > deadline:
                return 1
            time.sleep(_POLL_S)
            seen += f.read()
        os.kill(pid, signal.SIGSTOP)
        seen += f.read()
    sys.stdout.buffer.write(seen)
    return 0


if __name__ == "__main__":
    path, begin_at, process, said, seconds = sys.argv[1:]
    sys.exit(main(Path(path), int(begin_at), int(process), said.encode(), float(seconds)))
