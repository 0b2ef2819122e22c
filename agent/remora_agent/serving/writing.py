"""Messages to callers who read slowly, or not at all.

gRPC takes a message when those before it have left, so a caller who reads nothing keeps its writer
waiting. Here that has an end. Knows nothing of what is written.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from remora_contract.errors import DeadlineExceeded

STALL_S = 60.0  # as long as HTTP's readers get


async def write(context: Any, message: Any, stall_s: float = STALL_S) -> None:
    """Returns when gRPC has taken `message`, which is as fast as the caller reads.

    Raises DeadlineExceeded when the caller reads nothing for `stall_s`. The call must end then: its
    status waits in gRPC, behind what is unread, for a caller who reads on after all.
    """
    watch = _Watch(stall_s)
    try:
        await context.write(message)
    except asyncio.CancelledError:
        if not watch.rang:
            raise
        raise DeadlineExceeded(
            f"nothing of the answer was read for {stall_s:g} s; read the stream as it comes, or "
            "ask for the whole answer at once"
        ) from None
    finally:
        watch.close()


class _Watch:
    """Cancels the task that made it after `seconds`. asyncio.wait_for would do the same with a task
    more for every message, and asyncio.timeout needs Python 3.11."""

    def __init__(self, seconds: float) -> None:
        task = asyncio.current_task()
        assert task is not None  # a coroutine runs in one
        self._task = task
        self._timer = asyncio.get_running_loop().call_later(seconds, self._ring)
        self.rang = False

    def close(self) -> None:
        self._timer.cancel()
        if self.rang and sys.version_info >= (3, 11):
            self._task.uncancel()

    def _ring(self) -> None:
        self.rang = True
        self._task.cancel()
