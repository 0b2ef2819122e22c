"""Resident adapters and the mixes made of them, as arrays an engine can bind. Runs nothing.

How a mix is packed is `packing`'s; where the graph takes more than factors on projections, `extras`
says what a mix binds besides.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from remora_agent.bank.weights import AdapterWeights
from remora_agent.engine.ort.extras import (
    Extras,
    Vectors,
    embedding_change,
    uses_extras,
)
from remora_agent.engine.ort.packing import Packed, pack, packed_views
from remora_agent.engine.protocol import Mix, MixEntry
from remora_agent.engine.vectors import check_together
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import AdapterInvalid, Exhausted, NotFound
from remora_contract.targets import EXPERT_GROUPS

_COMPOSED_KEPT = 8


@dataclass(frozen=True)
class Prepared:
    """An adapter's own packed mix, made ahead."""

    factors: Packed


class Bank:
    """Which adapters are resident, and their packed mixes. Composed mixes, of which there are as
    many as requests choose weights, are kept while used: at least one for each row, so that a step
    of rows with as many mixes packs nothing anew."""

    def __init__(
        self,
        decoder: DecoderSpec,
        max_rank: int,
        rows: int = _COMPOSED_KEPT,
        extras: Extras | None = None,
    ) -> None:
        self._decoder = decoder
        self._max_rank = max_rank
        self._composed_kept = max(_COMPOSED_KEPT, rows)
        self._resident: dict[int, AdapterWeights] = {}
        self._packed: OrderedDict[Mix, Packed] = OrderedDict()
        self._forgotten: list[Packed] = []
        self._next_handle = 1
        self._extras = extras or Extras()
        self._vectors = Vectors(decoder, self._extras)
        self.empty = self._pack(())

    def prepare(self, weights: AdapterWeights) -> AdapterWeights:
        """Its factors packed, and `tensors` views of them. Touches nothing that changes. Raises
        AdapterInvalid."""
        self._check(weights)
        packed = pack(self._decoder, ((weights, 1.0),), None, self._extras)
        return replace(weights, tensors=packed_views(weights, packed), prepared=Prepared(packed))

    def add(self, weights: AdapterWeights) -> int:
        """Raises Exhausted, AdapterInvalid. What is not prepared is packed here, not at the first
        request."""
        self._check(weights)
        used = sum(w.rank for w in self._resident.values())
        if used + weights.rank > self._max_rank:
            raise Exhausted(
                f"adapter {weights.digest[:19]} needs rank {weights.rank}; the bank holds "
                f"{used} of {self._max_rank}: unload an adapter, or export with --max-bank-rank"
            )
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        self._resident[handle] = weights
        try:
            self.packed((MixEntry(handle, 1.0),))
        except MemoryError:
            del self._resident[handle]  # nobody was given its handle
            raise
        return handle

    def remove(self, handle: int) -> list[Packed]:
        """Forgets the adapter and every mix it is part of; returns those. Raises NotFound."""
        self._find(handle)
        del self._resident[handle]
        mixes = [m for m in self._packed if any(e.handle == handle for e in m)]
        return [self._packed.pop(mix) for mix in mixes]

    def packed(self, mix: Mix) -> Packed:
        """The arrays of a mix; the same object for the same mix. Raises NotFound."""
        if not mix:
            return self.empty
        known = self._packed.get(mix)
        if known is None:
            entries = self.entries(mix)
            check_together(entries)
            ready = entries[0][0].prepared if [e.weight for e in mix] == [1.0] else None
            known = self._packed[mix] = self._pack(entries, self._twin(mix), ready)
            self._forget_old()
        self._packed.move_to_end(mix)
        return known

    def uses_extras(self, mix: Mix) -> bool:
        """Whether it changes more than the layers' projections by factors. Raises NotFound."""
        return any(uses_extras(self._find(e.handle)) for e in mix)

    def embedding_change(self, mix: Mix, tokens: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """[m, hidden] for tokens [m]; None for nothing. Raises NotFound."""
        return embedding_change(self.entries(mix), tokens)

    def entries(self, mix: Mix) -> tuple[tuple[AdapterWeights, float], ...]:
        """The adapters of a mix and their weights. Raises NotFound."""
        return tuple((self._find(e.handle), e.weight) for e in mix)

    def _pack(
        self,
        entries: tuple[tuple[AdapterWeights, float], ...],
        twin: Packed | None = None,
        ready: object | None = None,
    ) -> Packed:
        if isinstance(ready, Prepared):
            factors = ready.factors
        else:
            factors = pack(self._decoder, entries, twin, self._extras)
        return {**factors, **self._vectors.packed(entries)}

    def take_forgotten(self) -> list[Packed]:
        """Mixes forgotten since the last call; whoever holds their arrays lets go of them."""
        forgotten, self._forgotten = self._forgotten, []
        return forgotten

    def _forget_old(self) -> None:
        composed = [m for m in self._packed if len(m) > 1 or m[0].weight != 1.0]
        for mix in composed[: max(0, len(composed) - self._composed_kept)]:
            self._forgotten.append(self._packed.pop(mix))

    def _twin(self, mix: Mix) -> Packed | None:
        """A packed mix of the same adapters with other weights: its A factors are the same."""
        handles = [e.handle for e in mix]
        same = (m for m in self._packed if [e.handle for e in m] == handles)
        return next((self._packed[m] for m in same), None)

    def _find(self, handle: int) -> AdapterWeights:
        if handle not in self._resident:
            raise NotFound(f"no resident adapter has handle {handle}")
        return self._resident[handle]

    def _check(self, weights: AdapterWeights) -> None:
        self._check_taken(weights)
        for target, (a, b) in weights.tensors.items():
            k = self._decoder.in_features(target.projection)
            n = self._decoder.out_features(target.projection)
            if not 0 <= target.layer < self._decoder.layers:
                raise AdapterInvalid(
                    f"adapter {weights.digest[:19]}: {target.name()} does not exist; the model "
                    f"has {self._decoder.layers} layers"
                )
            copies = self._decoder.copies(target.projection)
            lead = (copies,) if target.group in EXPERT_GROUPS else ()
            rank = a.shape[-1] if a.ndim else 0
            if not rank or a.shape != (*lead, k, rank) or b.shape != (*lead, rank, n):
                raise AdapterInvalid(
                    f"adapter {weights.digest[:19]}: {target.name()} has A {list(a.shape)} and "
                    f"B {list(b.shape)}, not [{k}, r] and [r, {n}]"
                )

    def _check_taken(self, weights: AdapterWeights) -> None:
        """The graph has an input for all that it changes."""
        features = {"embed": self._extras.embed, "head": self._extras.head}
        for target in {**weights.tensors, **weights.vectors}:
            expert = target.group in EXPERT_GROUPS
            taken = self._extras.experts if expert else features.get(target.projection, True)
            if not taken:
                feature = "experts" if expert else target.projection
                raise AdapterInvalid(
                    f"adapter {weights.digest[:19]} changes {target.name()}, for which the engine "
                    f"has no input; export the bundle with --adapt {feature}"
                )
        for target, vectors in weights.vectors.items():
            n = self._decoder.out_features(target.projection)
            for what, vector, has in (
                ("--dora", vectors.scale, self._extras.dora),
                ("--adapter-bias", vectors.bias, self._extras.bias),
            ):
                if vector is not None and (not has or vector.shape != (n,)):
                    raise AdapterInvalid(
                        f"adapter {weights.digest[:19]}: {target.name()} has a vector "
                        f"{list(vector.shape)}; the engine takes [{n}] of a bundle exported with "
                        f"{what}"
                    )
