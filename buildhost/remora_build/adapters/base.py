"""The base model's own weights, where an adapter cannot be carried without them.

    DoRA                the norms of the projections' rows
    trained biases      the base's, from which they differ
    trained tokens      the base's rows of the embedding and head
    copied embeddings   that they are the base's

A bundle has biases and embedding in its own dtype, and the projections unless it is quantized. A
checkpoint (`--checkpoint`) has all of it, and is proven to be the bundle's base before anything
that came from it is written. Owns the promise; `base_bundle` and `base_checkpoint` keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from remora_build.adapters.bound import NormPlace
from remora_build.adapters.modules import Parts
from remora_contract.errors import Unsupported

Array = NDArray[np.float32]
Blocks = Iterator[tuple[int, int, Array]]  # (first row, first column, [rows, columns])
Rows = Iterable[NDArray[Any]]  # some rows after each other, in the type they are stored in
Table = Literal["embed", "head"]
Advance = Callable[[int], None]  # bytes read since the last call


def silent(_: int) -> None:
    pass


class BaseWeights(Protocol):
    """Every method raises Refused where it has not what is asked for, saying what would, and the
    errors of its files. Open only inside `with`."""

    def __enter__(self) -> BaseWeights: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def weight(self, parts: Parts) -> Blocks:
        """A module's weight [n, k], of the embedding [hidden, vocab], in pieces."""
        ...

    def bias(self, parts: Parts) -> Array:
        """A module's [n]."""
        ...

    def norm_bias(self, place: NormPlace) -> Array: ...

    def rows(self, table: Table, tokens: tuple[int, ...]) -> Array:
        """Of the embedding's or the head's weight [vocab, hidden]: [tokens, hidden]."""
        ...

    def is_copy(self, table: Table, copy: Rows) -> bool:
        """Whether `copy`, a whole table, is the base's (see `same_rows`)."""
        ...

    def confirm(self) -> None:
        """Proves that it is the base of the bundle. Raises Refused."""
        ...


class NoBase:
    """For readers of plain LoRA: whatever needs the base is refused."""

    def __enter__(self) -> NoBase:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def weight(self, parts: Parts) -> Blocks:
        raise _only_plain("DoRA")

    def bias(self, parts: Parts) -> Array:
        raise _only_plain("a trained bias")

    def norm_bias(self, place: NormPlace) -> Array:
        raise _only_plain("a trained bias")

    def rows(self, table: Table, tokens: tuple[int, ...]) -> Array:
        raise _only_plain("trained tokens")

    def is_copy(self, table: Table, copy: Rows) -> bool:
        raise _only_plain("an adapter on the embedding or the head")

    def confirm(self) -> None:
        pass


def _only_plain(what: str) -> Unsupported:
    return Unsupported(f"{what} cannot be carried to another format, only plain LoRA factors can")


def same_rows(own: Rows, copy: Rows) -> bool:
    """Whether both hold the same numbers, the finer type being rounded to the coarser: a model that
    was loaded in half precision saves its embedding so."""
    theirs = iter(copy)
    block: NDArray[Any] = np.empty((0, 0))
    for rows in own:
        while len(rows):
            if not len(block):
                block = next(theirs, block)
            count = min(len(rows), len(block))
            if not count or not _equal(rows[:count], block[:count]):
                return False
            rows, block = rows[count:], block[count:]
    return not len(block) and next(theirs, None) is None


def _equal(a: NDArray[Any], b: NDArray[Any]) -> bool:
    with np.errstate(over="ignore"):
        return np.array_equal(a.astype(b.dtype), b) or np.array_equal(a, b.astype(a.dtype))
