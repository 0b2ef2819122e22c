"""What the engine is to compute next, as the scheduler says it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PrefillChunk:
    request_id: str
    row: int
    start: int
    stop: int
    last: bool  # its logits give a token
    again: bool = False  # of a text that was read before, with what was answered since

    @property
    def request_ids(self) -> tuple[str, ...]:
        return (self.request_id,)

    @property
    def rows(self) -> tuple[int, ...]:
        return (self.row,)


@dataclass(frozen=True)
class DecodeStep:
    request_ids: tuple[str, ...]
    rows: tuple[int, ...]


Work = PrefillChunk | DecodeStep
