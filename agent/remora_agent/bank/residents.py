"""The adapters that are in the engine, each with its handle and what holds it. Decides nothing."""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from remora_agent.bank.policy import Place, Size
from remora_agent.bank.weights import AdapterWeights
from remora_agent.engine.protocol import Engine
from remora_contract.errors import AdapterInvalid, anew

log = logging.getLogger(__name__)

_MAX_REFUSED = 256


@dataclass(frozen=True)
class _Resident:
    handle: int
    place: Place


class Residents:
    """One thread uses it: the one that drives the engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._residents: dict[str, _Resident] = {}
        self._refused: OrderedDict[str, AdapterInvalid] = OrderedDict()
        self._uses = itertools.count(1)

    def __contains__(self, digest: str) -> bool:
        return digest in self._residents

    def digests(self) -> Collection[str]:
        return self._residents.keys()

    def handle(self, digest: str) -> int:
        return self._residents[digest].handle

    def place(self, digest: str) -> Place | None:
        resident = self._residents.get(digest)
        return None if resident is None else resident.place

    def places(self, pinned: Collection[str]) -> tuple[Place, ...]:
        return tuple(
            replace(r.place, pinned=digest in pinned) for digest, r in self._residents.items()
        )

    def check_not_refused(self, digests: Iterable[str]) -> None:
        """Raises what the engine refused one of them with before: it must not make others leave
        again and again. The same bytes in the same engine stay refused."""
        for digest in digests:
            if digest in self._refused:
                raise anew(self._refused[digest])

    def add(self, weights: AdapterWeights, now: float) -> None:
        """Raises what the engine refuses it with."""
        try:
            handle = self._engine.add_adapter(weights)
        except AdapterInvalid as e:
            self._remember(weights.digest, e)
            raise
        size = Size(weights.rank, weights.bank_bytes)
        place = Place(weights.digest, size, 0, False, False, next(self._uses), now)
        self._residents[weights.digest] = _Resident(handle, place)
        log.info("adapter.resident", extra={"digest": weights.digest, "rank": weights.rank})

    def remove(self, digest: str) -> None:
        resident = self._residents.pop(digest)
        self._engine.remove_adapter(resident.handle)
        log.info("adapter.evicted", extra={"digest": digest})

    def hold(self, digest: str, *, is_use: bool = True) -> None:
        """One lease more; a lease is a use, unless it is said to be none."""
        place = self._residents[digest].place
        used = next(self._uses) if is_use else place.used
        self._put(digest, replace(place, leases=place.leases + 1, used=used))

    def let_go(self, digest: str) -> Place:
        """One lease less."""
        place = self._residents[digest].place
        return self._put(digest, replace(place, leases=place.leases - 1))

    def drain(self, digest: str, *, draining: bool) -> None:
        self._put(digest, replace(self._residents[digest].place, draining=draining))

    def _remember(self, digest: str, error: AdapterInvalid) -> None:
        self._refused[digest] = anew(error)
        if len(self._refused) > _MAX_REFUSED:
            self._refused.popitem(last=False)

    def _put(self, digest: str, place: Place) -> Place:
        self._residents[digest] = replace(self._residents[digest], place=place)
        return place
