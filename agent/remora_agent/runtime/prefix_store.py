"""Blocks of keys and values in host memory, least recently used first out, within a cap of bytes.
Knows no tokens and no engine.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from remora_agent.engine.protocol import KvBlock


class PrefixStore:
    """Not thread-safe; the counts may be read by any thread."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._blocks: OrderedDict[bytes, KvBlock] = OrderedDict()  # oldest use first
        self.bytes = 0
        self.evictions = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def get(self, key: bytes) -> KvBlock | None:
        return self._blocks.get(key)

    def used(self, keys: Sequence[bytes]) -> None:
        """A chain from its first block on. The last is the first to go: without those before it a
        block is of no use."""
        for key in reversed(keys):
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def put(self, key: bytes, block: KvBlock, chain: Collection[bytes]) -> bool:
        """Whether it was taken; not when only blocks of its own `chain` would make room."""
        if block.bytes > self._max_bytes:
            return False
        while self.bytes + block.bytes > self._max_bytes:
            oldest = next(iter(self._blocks), None)
            if oldest is None or oldest in chain:
                return False
            self._evict(oldest)
        self._blocks[key] = block
        self.bytes += block.bytes
        return True

    def clear(self) -> None:
        while self._blocks:
            self._evict(next(iter(self._blocks)))

    def _evict(self, key: bytes) -> None:
        self.bytes -= self._blocks.pop(key).bytes
        self.evictions += 1
