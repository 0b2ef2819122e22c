"""An agent in a process of its own, to be killed: -m tests.support.agent_process CONFIG HOLD.

Its host is scripted: a step named by an existing file HOLD/<step> (its text: the release) says so
by HOLD/<step>.reached and waits until the file is gone.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from remora_agent.config import AgentConfig, load_config
from remora_agent.control.layout import StateLayout
from remora_agent.control.service import run_agent
from remora_agent.host import Assignment, Progress
from remora_contract import structured_logs
from tests.support.scripted_host import ScriptedHost


def main() -> None:
    config, hold = load_config(Path(sys.argv[1])), Path(sys.argv[2])
    structured_logs.set_up("info")
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())

    @contextmanager
    def host(
        config: AgentConfig, layout: StateLayout, cancelled: Callable[[], bool]
    ) -> Iterator[ScriptedHost]:
        scripted = ScriptedHost()
        for step in ("build", "prove", "switch"):
            scripted.hooks[step] = holding(hold / step)
        yield scripted

    run_agent(config, stop, host)


def holding(file: Path):
    def hook(assignment: Assignment, progress: Progress) -> None:
        while file.exists() and file.read_text() == assignment.release_id:
            file.with_suffix(".reached").touch()
            progress("holding", 0.5)
            time.sleep(0.02)

    return hook


if __name__ == "__main__":
    main()
