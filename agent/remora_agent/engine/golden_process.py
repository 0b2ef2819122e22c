"""Runs golden questions in a child process (`golden_child`) and hears what it says."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from remora_agent.engine.build import ignore, never
from remora_agent.engine.child import ChildLimits, run_child
from remora_agent.host import Progress
from remora_contract.gates import GoldenQuestion
from remora_contract.strict import plain

log = logging.getLogger(__name__)
_CHILD = "remora_agent.engine.golden_child"


def ask_in_child(
    questions: Sequence[GoldenQuestion],
    sides: Sequence[dict[str, Any] | None],
    folder: Path,
    limits: ChildLimits,
    progress: Progress = ignore,
    cancelled: Callable[[], bool] = never,
) -> None:
    """`sides` are the new release and the incumbent, as golden_child.Side; `folder` is empty.
    Blocking.

    Raises what `golden` and loading raise, and EngineFault when the child dies.
    """
    new, incumbent = sides
    task = folder / "task.json"
    document = {"questions": plain(tuple(questions)), "new": new, "incumbent": incumbent}
    task.write_text(json.dumps(document))
    result = run_child(
        _CHILD,
        [str(task)],
        what="asking the release's golden questions",
        log_path=folder / "log",
        limits=limits,
        progress=progress,
        cancelled=cancelled,
    )
    log.info("release.golden_answered", extra=result)
