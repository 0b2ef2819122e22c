"""Adapters that an operator wants in the bank, and who waits to hear of it. One thread uses it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from remora_agent.bank.directory import Registered
from remora_contract.errors import RemoraError


@dataclass(frozen=True)
class _Preload:
    adapter: Registered
    futures: list[Future[None]] = field(default_factory=list)


class Preloads:
    def __init__(self) -> None:
        self._preloads: dict[str, _Preload] = {}

    def __bool__(self) -> bool:
        return bool(self._preloads)

    def add(self, adapter: Registered, done: Future[None]) -> None:
        self._preloads.setdefault(adapter.digest, _Preload(adapter)).futures.append(done)

    def adapters(self) -> Iterator[Registered]:
        """Of a copy: they may be settled meanwhile."""
        return iter([p.adapter for p in self._preloads.values()])

    def settle(self, digest: str, error: RemoraError | None = None) -> None:
        """Tells all who wait for it. Nothing happens when nobody does."""
        preload = self._preloads.pop(digest, None)
        for future in preload.futures if preload else ():
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    def settle_all(self, error: RemoraError) -> None:
        for digest in list(self._preloads):
            self.settle(digest, error)
