"""Is there memory for one more request? Pure; what is free comes from the caller's `free_bytes`.

The cache's pages are taken from the system when they are first written and stay taken. So a request
costs what its row has not held before, and those that run may still take what they have not
written yet. `floor_bytes` stay free whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from remora_agent.runtime.jobs import Job

_SAMPLE_S = 0.25  # a reading of the free memory counts so long
RETRY_AFTER_S = 2.0

Running = tuple[int, Job]  # row and job


class MemoryFloor:
    """`wrote` is called by the step thread, the rest by any under the scheduler's lock."""

    def __init__(
        self,
        free_bytes: Callable[[], int] | None,
        floor_bytes: int,
        rows: int,
        token_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        """`free_bytes` None: never short."""
        self._free_bytes = free_bytes
        self._floor_bytes = floor_bytes
        self._token_bytes = token_bytes
        self._clock = clock
        self._touched = [0] * rows  # most tokens that each row has ever held
        self._sample: tuple[float, int] | None = None

    def wrote(self, row: int, tokens: int) -> None:
        self._touched[row] = max(self._touched[row], tokens)

    @property
    def low(self) -> bool:
        """Whether less than the floor is free."""
        free = self._free()
        return free is not None and free < self._floor_bytes

    def widest(self, rows: Sequence[int]) -> int:
        """The row that has held most."""
        return max(rows, key=self._touched.__getitem__)

    def refusal(self, job: Job, running: Sequence[Running], rows: Sequence[int]) -> str | None:
        """Why there is no memory for a job in the best of `rows`; None when there is."""
        free = self._free()
        if free is None:
            return None
        pending = sum(self._missing(row, other.cost) for row, other in running)
        extents = {row: max(self._touched[row], other.cost) for row, other in running}
        missing = min(max(0, job.cost - extents.get(r, self._touched[r])) for r in rows)
        need = (pending + missing) * self._token_bytes
        if free - need >= self._floor_bytes:
            return None
        return (
            f"{free} bytes of memory are free; this request and those that run may take {need} "
            f"more, and {self._floor_bytes} are kept free. Try again later, or free memory"
        )

    def _missing(self, row: int, tokens: int) -> int:
        return max(0, tokens - self._touched[row])

    def _free(self) -> int | None:
        if self._free_bytes is None:
            return None
        now = self._clock()
        if self._sample is None or now - self._sample[0] >= _SAMPLE_S:
            self._sample = (now, self._free_bytes())
        return self._sample[1]
