"""An end to the matching of an adapter's regular expressions, which come from outside: one like
`((a+)+)+!` takes longer than anybody waits. Owns the time; knows no pattern.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from remora_contract.errors import AdapterInvalid

MATCHING_S = 20.0  # of the processor; 10,000 modules take less than one


@contextmanager
def matching(where: str) -> Iterator[None]:
    """Raises AdapterInvalid out of its block after MATCHING_S. Only in the main thread, in which
    commands run: Python tells signals to no other."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(number: int, frame: FrameType | None) -> NoReturn:
        raise AdapterInvalid(
            f"{where}: its regular expressions (target_modules, exclude_modules, rank_pattern, "
            f"alpha_pattern, layers_pattern) need more than {MATCHING_S:g} s to match modules: "
            "write them without a repetition inside a repetition"
        )

    before = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, MATCHING_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
