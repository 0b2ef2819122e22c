"""The Watch stream: each poke makes the Sync loop run early. Losing it costs latency only."""

from __future__ import annotations

import logging
from collections.abc import Callable

import grpc

from remora_agent.control.client import ControllerClient
from remora_agent.control.interrupt import Interrupt
from remora_agent.control.pacing import Backoff
from remora_contract.errors import Cancelled

log = logging.getLogger(__name__)


class Watcher:
    """Runs in its own thread until `stop`."""

    def __init__(
        self,
        client: ControllerClient,
        on_poke: Callable[[], None],
        random_unit: Callable[[], float],
        backoff: Backoff,
    ) -> None:
        self._client, self._on_poke = client, on_poke
        self._random_unit, self._backoff = random_unit, backoff
        self._interrupt = Interrupt()
        self._call: grpc.Call | None = None

    def run(self) -> None:
        failures = 0
        try:
            while True:
                failures = 0 if self._listen() else failures + 1
                # Even a stream that worked may end because the controller restarts: do not rush.
                delay_s = self._backoff.delay_s(failures, self._random_unit())
                self._interrupt.sleep(delay_s)
        except Cancelled:
            return

    def use(self, client: ControllerClient) -> None:
        """From now on; for a renewed certificate."""
        self._client = client
        self._cancel()

    def stop(self) -> None:
        self._interrupt.set("the agent stops")
        self._cancel()

    def _listen(self) -> bool:
        """Until the stream ends. True when it brought at least one poke."""
        poked = False
        self._interrupt.check()
        try:
            self._call = self._client.watch()
        except Cancelled:  # a renewed certificate has just replaced the client
            return False
        try:
            self._interrupt.check()  # again: a stop before `_call` was there had nothing to cancel
            for _ in self._call:
                poked = True
                self._on_poke()
        except grpc.RpcError as e:
            log.debug("watch.ended", extra={"cause": e.details() or e.code().name})
        return poked

    def _cancel(self) -> None:
        if self._call is not None:
            self._call.cancel()
