"""Do two stored tensors hold the same values? Read in pieces, only where a decision needs it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from remora_build.checkpoint.safetensors_file import TensorEntry
from remora_build.checkpoint.stream import numpy_dtype
from remora_build.merge.adapter import OpenAdapter
from remora_build.merge.changes import Change, LowRank, Replacement
from remora_build.merge.reading import CheckpointReader

_CHUNK_BYTES = 4 << 20


class Comparer:
    def __init__(self, reader: CheckpointReader, adapters: Sequence[OpenAdapter]) -> None:
        self._reader = reader
        self._adapters = adapters

    def is_copy(self, saved: Replacement, entry: TensorEntry) -> bool:
        """Is what the adapter saved the checkpoint's own tensor (in the checkpoint's dtype)?"""
        first = 0
        for block in self._adapters[saved.adapter].weights.rows(saved.tensor):
            rows = block.reshape(-1, block.shape[-1]).astype(np.float32)
            with np.errstate(over="ignore"):
                own = rows.astype(numpy_dtype(entry.dtype)).view(np.uint8)
            stored = self._reader.rows(entry, first, len(rows)).view(np.uint8)
            if not np.array_equal(own, stored):
                return False
            first += len(rows)
        return True

    def stored_alike(self, one: TensorEntry, other: TensorEntry) -> bool:
        """Are two tensors of the checkpoint the same bytes?"""
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        for start in range(0, one.bytes, _CHUNK_BYTES):
            size = min(_CHUNK_BYTES, one.bytes - start)
            mine, theirs = (self._reader.raw(entry, start, size) for entry in (one, other))
            if not np.array_equal(mine, theirs):
                return False
        return True

    def changed_alike(self, embedding: Change, head: Change) -> bool:
        """Do an adapter's tensors for a head say what those for its embedding say?"""
        if (embedding.base is None) != (head.base is None):
            return False
        if len(embedding.products) != len(head.products):
            return False
        bases = embedding.base is None or head.base is None or self._same(embedding.base, head.base)
        pairs = zip(embedding.products, head.products, strict=True)
        return bases and all(self._crossed(one, other) for one, other in pairs)

    def _same(self, one: Replacement, other: Replacement) -> bool:
        rows = [self._adapters[r.adapter].weights.rows(r.tensor) for r in (one, other)]
        return all(np.array_equal(a, b) for a, b in zip(*rows, strict=True))

    def _crossed(self, embedding: LowRank, head: LowRank) -> bool:
        """The head's A is the embedding's B transposed, and the other way round."""
        own, other = (self._adapters[p.adapter].weights.float32 for p in (embedding, head))
        return np.array_equal(own(embedding.b).T, other(head.a)) and np.array_equal(
            own(embedding.a).T, other(head.b)
        )
