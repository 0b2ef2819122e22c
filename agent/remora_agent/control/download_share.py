"""What a rollout's total bandwidth leaves this device: told with each Sync while it fetches.

Before the first answer, and when none came for as long as the last one holds, nothing is fetched.
The worker thread fetches, the Sync thread tells and hears.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from remora_protos.control.v1 import control_pb2 as pb

_POLL_S = 0.1  # while it has to wait
_MOST_FOR_S = 3600.0


@dataclass(frozen=True)
class _Share:
    bytes_per_s: int | None  # None: no limit of this kind
    until_s: float


class DownloadShare:
    def __init__(self, own_limit: int | None, now: Callable[[], float]) -> None:
        """`now` is monotonic; `on_change`, when fetching begins and ends, must return at once."""
        self._own_limit, self._now = own_limit, now
        self.on_change: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._is_shared = self._is_fetching = False
        self._limit = own_limit
        self._share = _Share(0, 0.0)

    def assigned(self, is_shared: bool, limit: int | None) -> None:
        """What is fetched from now on is for an assignment that shares bandwidth, or does not."""
        limits = [rate for rate in (self._own_limit, limit) if rate is not None]
        with self._lock:
            self._is_shared, self._limit = is_shared, min(limits, default=None)

    @contextmanager
    def fetching(self) -> Iterator[None]:
        with self._lock:
            self._is_fetching, self._share = self._is_shared, _Share(0, 0.0)
            begins = self._is_fetching
        if begins:
            self.on_change()
        try:
            yield
        finally:
            with self._lock:
                self._is_fetching = False
            if begins:
                self.on_change()  # the share is free for others

    def rate(self) -> int | None:
        """Bytes a second at this moment; 0: wait; None: no limit of this kind."""
        with self._lock:
            if not self._is_fetching:
                return None
            return self._share.bytes_per_s if self._now() < self._share.until_s else 0

    def wait_s(self) -> float:
        """How long to wait before asking `rate` again; 0: not at all."""
        return _POLL_S if self.rate() == 0 else 0.0

    def put_into(self, request: pb.SyncRequest) -> float:
        """Returns the time from which an answer's share counts."""
        now_s = self._now()
        with self._lock:
            if self._is_fetching:
                held = self._share.bytes_per_s if now_s < self._share.until_s else 0
                request.fetching.limit_bytes_per_s = self._limit or 0
                request.fetching.share_bytes_per_s = held or 0
        return now_s

    def answered(self, request: pb.SyncRequest, answer: pb.SyncResponse, asked_s: float) -> None:
        """An answer to a request that did not say that this device fetches tells nothing."""
        if not request.HasField("fetching"):
            return
        share = _Share(None, math.inf)
        if answer.HasField("download_share"):
            for_s = answer.download_share.for_s
            for_s = min(_MOST_FOR_S, for_s) if math.isfinite(for_s) else 0.0
            share = _Share(answer.download_share.bytes_per_s, asked_s + for_s)
        with self._lock:
            self._share = share
