"""Shards written tensor after tensor: panels are read and merged by a pool, put down in order.

Owns what is in memory: the factors of the tensor in hand and a few panels.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from remora_build.checkpoint.safetensors_file import TensorEntry
from remora_build.export.progress import Advance
from remora_build.merge.adapter import OpenAdapter
from remora_build.merge.changes import Change
from remora_build.merge.operands import F32, Loader
from remora_build.merge.panels import Panel, Work, merged, panels, rounded, summed
from remora_build.merge.planning import Output
from remora_build.merge.reading import CheckpointReader, Grid
from remora_build.merge.shard_file import ShardFile, read_metadata

_COPY_BYTES = 1 << 20
_MAX_THREADS = 4

T = TypeVar("T")
Values = Callable[[], NDArray[np.generic]]


def threads() -> int:
    return max(1, min(_MAX_THREADS, os.cpu_count() or 1))


def in_order(pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], T]], ahead: int) -> Iterator[T]:
    """Results of the tasks in their order, at most `ahead` of them waiting."""
    waiting: deque[Future[T]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


class ShardWriter:
    def __init__(
        self,
        reader: CheckpointReader,
        adapters: Sequence[OpenAdapter],
        pool: ThreadPoolExecutor,
        advance: Advance,
    ) -> None:
        self._reader = reader
        self._weights = [a.weights for a in adapters]
        self._loader = Loader(self._weights)
        self._pool = pool
        self._ahead = 2 * threads()
        self._advance = advance

    def write(self, path: Path, outputs: Sequence[Output]) -> None:
        """Raises AdapterInvalid, CheckpointInvalid; OSError when writing fails."""
        metadata = read_metadata(outputs[0].entry.path)
        tasks = (task for output in outputs for task in self._tasks(output))
        with ShardFile(path, [o.entry for o in outputs]) as file:
            file.begin(metadata)
            for block in in_order(self._pool, tasks, self._ahead):
                file.append(block)
                self._advance(block.nbytes)

    def _tasks(self, output: Output) -> Iterator[Values]:
        entry, change = output.entry, output.change
        if change is None:
            for start in range(0, entry.bytes, _COPY_BYTES):
                size = min(_COPY_BYTES, entry.bytes - start)
                yield partial(self._reader.raw, entry, start, size)
            return
        work, block = self._work(entry, change), 0
        for panel, values in self._values(entry, change):
            if panel.block != block:
                block = panel.block
                work = replace(work, operands=self._loader.operands(change.products, block))
            yield partial(_finished, panel, values, work, entry)

    def _values(self, entry: TensorEntry, change: Change) -> Iterator[tuple[Panel, Values]]:
        """What the change starts from: the checkpoint's rows, or the adapter's in their place."""
        if change.base is None:
            stacked = any(p.experts and p.experts.index is None for p in change.products)
            height = entry.shape[1] if stacked else None
            for panel in panels(entry, height):
                yield panel, partial(self._reader.rows, entry, panel.first, panel.count)
            return
        columns, first = Grid.of(entry).columns, 0
        for block in self._weights[change.base.adapter].rows(change.base.tensor):
            rows = block.reshape(-1, columns).copy()  # a yielded one is valid until the next
            yield Panel(first, len(rows), 0, first), partial(_itself, rows)
            first += len(rows)

    def _work(self, entry: TensorEntry, change: Change) -> Work:
        work = Work(
            operands=self._loader.operands(change.products) if change.products else None,
            shift=self._loader.shift(change.shifts) if change.shifts else None,
            rows={
                index: values
                for r in change.rows
                for index, values in zip(
                    r.indices, self._loader.tensor(r.adapter, r.tensor), strict=True
                )
            },
        )
        magnitude = change.magnitude
        if magnitude is None:
            return work
        values = self._loader.tensor(magnitude.adapter, magnitude.tensor)
        if magnitude.per == "row":
            return replace(work, row_magnitude=values)
        norms = self._column_norms(entry, change, work)
        with np.errstate(divide="ignore", invalid="ignore"):
            return replace(work, column_factor=values / norms)

    def _column_norms(self, entry: TensorEntry, change: Change, work: Work) -> F32:
        """‖W + Σ scale · B A‖ of every column: a pass of its own before the tensor is written."""
        tasks = (
            partial(_squares, panel, values, work) for panel, values in self._values(entry, change)
        )
        total = np.zeros(Grid.of(entry).columns)
        for squares in in_order(self._pool, tasks, self._ahead):
            total += squares
        return np.sqrt(total).astype(np.float32)


def _itself(rows: NDArray[np.generic]) -> NDArray[np.generic]:
    return rows


def _finished(panel: Panel, values: Values, work: Work, entry: TensorEntry) -> NDArray[np.generic]:
    return rounded(merged(panel, values(), work), entry)


def _squares(panel: Panel, values: Values, work: Work) -> NDArray[np.float64]:
    rows = summed(panel, values(), work.operands)
    squares: NDArray[np.float64] = np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
    return squares
