"""A stop that long work notices: waits end early and the next check raises Cancelled."""

from __future__ import annotations

import threading

from remora_contract.errors import Cancelled


class Interrupt:
    def __init__(self) -> None:
        self._event = threading.Event()
        self._reason = ""

    def set(self, reason: str) -> None:
        self._reason = reason
        self._event.set()

    def clear(self) -> None:
        self._event.clear()

    def check(self) -> None:
        """Raises Cancelled once set."""
        if self._event.is_set():
            raise Cancelled(self._reason)

    def sleep(self, seconds: float) -> None:
        """Raises Cancelled as soon as set."""
        self._event.wait(seconds)
        self.check()
