"""Prefixes that need not be computed again: those that still lie in a row, and copies of others.

Owns what is known of each row's content. Only whole blocks are reused, and never a prompt's last
token, whose logits are wanted. Driven by the step thread; `counts` by any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from remora_agent.engine.protocol import Engine
from remora_agent.runtime.prefix_keys import BLOCK, Acting, PrefixKeys
from remora_agent.runtime.prefix_store import PrefixStore

COPY_BLOCKS = 32  # copied in one step at most, so that running answers keep their pace


@dataclass(frozen=True)
class PrefixCounts:
    lookups: int = 0  # requests that looked for a prefix
    hits: int = 0  # those that found one
    tokens: int = 0  # prompt tokens that were not computed
    evictions: int = 0  # blocks that left host memory
    bytes: int = 0  # in host memory now


class PrefixCache:
    def __init__(
        self,
        engine: Engine,
        max_bytes: int,
        low_memory: Callable[[], bool] = lambda: False,
    ) -> None:
        """`max_bytes` 0: nothing is ever reused. While `low_memory`, copies are given up instead of
        made."""
        self._engine = engine
        self._on = max_bytes > 0
        self._copies = self._on and engine.limits.copies_kv
        self._low_memory = low_memory
        self._store = PrefixStore(max_bytes)
        self._held: list[Sequence[bytes]] = [()] * engine.limits.rows  # whole blocks of each row
        self._lookups = self._hits = self._tokens = 0

    @property
    def counts(self) -> PrefixCounts:
        store = self._store
        return PrefixCounts(self._lookups, self._hits, self._tokens, store.evictions, store.bytes)

    def keys(self, salt: str, acting: Sequence[Acting], prompt: Sequence[int]) -> PrefixKeys | None:
        """Those of the prompt, made here once; None for a request that neither reuses nor leaves
        anything."""
        if not self._on:
            return None
        self._lookups += 1
        switch = self._engine.limits.switch
        switched = switch is not None and len(prompt) > switch
        keys = PrefixKeys(self._engine.digest, salt, acting, switched=switched)
        keys.of(prompt, _whole(prompt))
        return keys

    def choose_row(
        self, keys: PrefixKeys | None, prompt: Sequence[int], free: Sequence[int]
    ) -> int:
        """The free row that saves most: one that holds more of the prompt than the copies do, then
        one beside the busy rows, because what lies between is computed too, then one that holds
        most of the prompt, then the one that holds least of anything."""
        wanted = keys.of(prompt, _whole(prompt)) if keys is not None else ()
        copied = _common([key for key in wanted if key in self._store], wanted)
        busy = set(range(len(self._held))) - set(free)

        def worth(row: int) -> tuple[int, int, int, int]:
            held = _common(self._held[row], wanted)
            growth = _span({*busy, row}) - _span(busy) if busy else 0
            return (max(0, held - copied), -growth, held, -len(self._held[row]))

        return max(free, key=worth)

    def spare_row(self, free: Sequence[int]) -> int | None:
        """The free row that can be written to with least lost: what it holds is nothing, or in the
        copies too. None where there is none."""

        def is_lost(row: int) -> bool:
            return any(key not in self._store for key in self._held[row])

        rows = [row for row in free if not is_lost(row)]
        return min(rows, key=lambda row: len(self._held[row])) if rows else None

    def reuse(self, row: int, keys: PrefixKeys | None, prompt: Sequence[int], start: int) -> int:
        """Tokens from `start` on that are in `row` now and need not be computed; all before
        `start` were reused."""
        if keys is None or start % BLOCK:
            return 0
        wanted, at = keys.of(prompt, _whole(prompt)), start // BLOCK
        found = _common(self._held[row], wanted)
        if found <= at:
            found = self._copy_in(row, wanted, at)
        if found <= at:
            return 0
        self._store.used(wanted[:found])
        self._hits += start == 0
        self._tokens += (found - at) * BLOCK
        return (found - at) * BLOCK

    def wrote(self, row: int, keys: PrefixKeys | None, tokens: Sequence[int], valid: int) -> None:
        """`row` holds `valid` tokens now, the first of `tokens`; whole new blocks are kept."""
        if keys is None:
            self._held[row] = ()
            return
        blocks, before = valid // BLOCK, self._held[row]
        held = keys.of(tokens, blocks)
        if len(before) == blocks and (not blocks or before[-1] == held[-1]):
            return
        self._held[row] = held
        if self._copies:
            self._copy_out(row, held)

    def crosses(self, row: int, valid: int) -> bool:
        """Whether so many valid tokens make a block whole that `wrote` has not seen."""
        return valid // BLOCK > len(self._held[row])

    def lost(self, row: int) -> None:
        """Nobody knows what the row holds."""
        self._held[row] = ()

    def _copy_in(self, row: int, wanted: Sequence[bytes], at: int) -> int:
        found = at
        for key in wanted[at : at + COPY_BLOCKS]:
            block = self._store.get(key)
            if block is None:
                break
            self._engine.write_kv(row, found * BLOCK, block)
            found += 1
            self._held[row] = wanted[:found]
        return found

    def _copy_out(self, row: int, held: Sequence[bytes]) -> None:
        """The blocks that are not there yet; equal keys, equal content."""
        if self._low_memory():
            self._store.clear()
            return
        chain = frozenset(held)
        for i, key in enumerate(held):
            if key not in self._store:
                block = self._engine.read_kv(row, i * BLOCK, (i + 1) * BLOCK)
                if not self._store.put(key, block, chain):
                    break
        self._store.used(held)


def _whole(prompt: Sequence[int]) -> int:
    """Blocks of a prompt that may be reused."""
    return (len(prompt) - 1) // BLOCK


def _span(rows: set[int]) -> int:
    return max(rows) - min(rows)


def _common(some: Sequence[bytes], others: Sequence[bytes]) -> int:
    count = 0
    for a, b in zip(some, others, strict=False):
        if a != b:
            break
        count += 1
    return count
