"""Adapter weights kept in host memory, as the engine takes them, in float32: a byte-capped LRU. One
thread uses it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from remora_agent.bank.weights import AdapterWeights


class HostCache:
    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._entries: OrderedDict[str, AdapterWeights] = OrderedDict()
        self._bytes = 0

    @property
    def bytes(self) -> int:
        return self._bytes

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    def digests(self) -> frozenset[str]:
        return frozenset(self._entries)

    def get(self, digest: str) -> AdapterWeights | None:
        """And makes it the most recently used."""
        weights = self._entries.get(digest)
        if weights is not None:
            self._entries.move_to_end(digest)
        return weights

    def put(self, weights: AdapterWeights, keep: Collection[str] = ()) -> bool:
        """Stores it, dropping the least recently used that are not in `keep`; False when that
        does not make room."""
        self.drop(weights.digest)
        for digest in [d for d in self._entries if d not in keep]:
            if self._bytes + weights.bank_bytes <= self.capacity_bytes:
                break
            self.drop(digest)
        if self._bytes + weights.bank_bytes > self.capacity_bytes:
            return False
        self._entries[weights.digest] = weights
        self._bytes += weights.bank_bytes
        return True

    def drop(self, digest: str) -> None:
        """Nothing happens when it is not there."""
        weights = self._entries.pop(digest, None)
        if weights is not None:
            self._bytes -= weights.bank_bytes

    def clear(self) -> None:
        self._entries.clear()
        self._bytes = 0
