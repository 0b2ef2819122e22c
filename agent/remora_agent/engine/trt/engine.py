"""The engine on TensorRT: which rows compute together, on what memory, in which order of calls.

A decode step always begins at slot 0 and takes a power of two of rows, so that few shapes exist.
Rows that are not asked for are computed too: they write to the first position they do not hold,
which their own next token overwrites. A row that is full has no such position; what its last one
held is put back behind the step.

A prompt's chunk may run beside decode steps (`flight`). Its row then lies above all rows of the
steps, so that no step computes it: where it does not, it changes places with the highest of those
that decoded last. What cannot run beside it waits for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from remora_agent.bank.weights import AdapterWeights
from remora_agent.engine import places
from remora_agent.engine.protocol import EngineLimits, KvBlock, Mix, RowStep, Shortlist, Watch
from remora_agent.engine.trt.device import Device
from remora_agent.engine.trt.flight import Flight, queue_chunk
from remora_agent.engine.trt.inputs import Asked, Places, StepShape
from remora_contract.errors import RequestInvalid, Unavailable, Unsupported


def row_bucket(rows: int, most: int) -> int:
    """1, 2, 4, 8, …: the first that holds `rows`; at most `most`."""
    size = 1
    while size < rows:
        size *= 2
    return min(size, most)


class TrtEngine:
    """See `engine.protocol.Engine`. Driven by one thread; `prepare` by any."""

    def __init__(self, backend: str, digest: str, limits: EngineLimits, device: Device) -> None:
        """Takes over `device`, which `close` frees."""
        self._backend = backend
        self._digest = digest
        self._limits = limits
        self._device = device
        self._shortlisted: list[int] = []  # slots whose logits `step_logits` may read
        self._decoded: set[int] = set()  # rows of the last step, and of prompts read since
        self._flight: Flight | None = None
        self._closed = False

    @property
    def backend(self) -> str:
        return self._backend

    @property
    def digest(self) -> str:
        return self._digest

    @property
    def limits(self) -> EngineLimits:
        return self._limits

    def prepare(self, weights: AdapterWeights) -> AdapterWeights:
        return self._device.bank.prepare(weights)

    def add_adapter(self, weights: AdapterWeights) -> int:
        self._check_open()
        return self._device.bank.add(weights)

    def remove_adapter(self, handle: int) -> None:
        self._check_open()
        self._device.bank.remove(handle)

    def prefill(
        self,
        row: int,
        tokens: NDArray[np.int64],
        start: int,
        mix: Mix = (),
        length: int | None = None,
    ) -> NDArray[np.float32]:
        self._check_chunk(row, tokens, start)
        (last,) = deque(self._read(row, tokens, start, mix, Asked.LAST, length), maxlen=1)
        only: NDArray[np.float32] = last[0]
        return only

    def score(
        self,
        row: int,
        tokens: NDArray[np.int64],
        start: int,
        mix: Mix = (),
        length: int | None = None,
    ) -> NDArray[np.float32]:
        self._check_chunk(row, tokens, start)
        places.check_scored(self._limits, tokens)
        return np.concatenate(list(self._read(row, tokens, start, mix, Asked.EVERY, length)))

    def embed(
        self,
        row: int,
        tokens: NDArray[np.int64],
        start: int,
        mix: Mix = (),
        length: int | None = None,
    ) -> NDArray[np.float32]:
        self._check_chunk(row, tokens, start)
        return np.concatenate(list(self._read(row, tokens, start, mix, Asked.STATES, length)))

    def _read(
        self,
        row: int,
        tokens: NDArray[np.int64],
        start: int,
        mix: Mix,
        asked: Asked,
        length: int | None,
    ) -> Iterator[NDArray[np.float32]]:
        """Reads tokens [s] step by step; of each what was asked for, [n or k, vocab or hidden]."""
        self._land()
        self._shortlisted = []
        device = self._device
        device.bank.check_mix(mix)
        text = places.Part.of(row, tokens, start, mix, length)
        most = device.scored if asked is Asked.EVERY else device.chunk
        for begin in range(0, len(text), most):
            part = text.cut(begin, most)
            shape = queue_chunk(device, part, asked)
            device.finish_read()
            device.cache.lengths[row] = part.stop
            states = asked is Asked.STATES
            yield device.states(shape.states) if states else device.read_logits(shape.logits)
        self._decoded.add(row)  # it is about to decode, if anything

    def begin_prefill(
        self,
        row: int,
        tokens: NDArray[np.int64],
        start: int,
        mix: Mix = (),
        length: int | None = None,
    ) -> None:
        self._check_chunk(row, tokens, start)
        if not self._limits.overlaps:
            raise Unsupported("this engine reads no prompt beside decode steps")
        if self._flight is not None:
            raise RequestInvalid("one prompt is read beside decode steps already: end it first")
        self._device.bank.check_mix(mix)
        self._lift(row)
        flight = Flight(self._device, places.Part.of(row, tokens, start, mix, length))
        flight.begin()
        self._flight = flight

    def prefill_ready(self) -> bool:
        return self._flying().ready()

    def end_prefill(self) -> NDArray[np.float32]:
        flight = self._flying()
        self._flight = None
        self._decoded.add(flight.row)
        return flight.end()

    def _flying(self) -> Flight:
        self._check_open()
        if self._flight is None:
            raise RequestInvalid("no prompt is read beside decode steps")
        return self._flight

    def _lift(self, row: int) -> None:
        """Puts a row above those that decoded last, which are those that decode next."""
        slots = self._device.cache.slots
        top = max((slots[r] for r in self._decoded if r != row), default=-1)
        if slots[row] < top:
            self._device.exchange(row, top)

    def _land(self, slots: Sequence[int] = ()) -> int | None:
        """Waits for the prompt that is read beside steps, unless a step of rows at `slots` may run
        beside it: below the slot that is returned. What went wrong is told by `end_prefill`."""
        flight = self._flight
        if flight is None or flight.has_landed:
            return None
        above = self._device.cache.slots[flight.row]
        if slots and max(slots) < above:
            return above
        flight.land()
        return None

    def decode(self, steps: Sequence[RowStep]) -> NDArray[np.float32]:
        self._check_open()
        if not steps:
            return np.empty((0, self._limits.vocab), np.float32)
        count = self._decode(steps, None)
        chosen: NDArray[np.float32] = self._device.logits(count)[self._slots(steps)]
        return chosen

    def decode_shortlist(self, steps: Sequence[RowStep], watches: Sequence[Watch]) -> Shortlist:
        self._check_open()
        self._check_watches(steps, watches)
        count = self._decode(steps, watches)
        self._shortlisted = self._slots(steps)
        return self._device.shortlist(count, self._shortlisted)

    def step_logits(self, index: int) -> NDArray[np.float32]:
        self._check_open()
        if not 0 <= index < len(self._shortlisted):
            raise RequestInvalid("the last step left no such row's logits on the device")
        return self._device.row_logits(self._shortlisted[index])

    def _decode(self, steps: Sequence[RowStep], watches: Sequence[Watch] | None) -> int:
        """Runs a step; how many rows it computed."""
        self._check_steps(steps)
        self._shortlisted = []
        device, cache, slots = self._device, self._device.cache, self._slots(steps)
        above = self._land(slots)
        count = row_bucket(max(slots) + 1, self._limits.rows)
        count = count if above is None else min(count, above)
        tokens = np.zeros((count, 1), np.int64)
        positions = cache.lengths[cache.rows[:count]]
        for step, slot in zip(steps, slots, strict=True):
            tokens[slot] = step.token
            positions[slot] = step.position
        named = {step.row for step in steps}
        full = [r for r in cache.full_rows(count) if r not in named]
        positions[[cache.slots[r] for r in full]] -= 1
        lengths = positions + 1
        for step, slot in zip(steps, slots, strict=True):
            if step.length is not None:
                lengths[slot] = step.length
        mixes = {slot: step.mix for slot, step in zip(slots, steps, strict=True)}
        shape = StepShape(count, 1, device.bank.bound(list(mixes.values())))
        device.fill(device.steps, shape, tokens, Places(positions, lengths), mixes)
        watched = None if watches is None else dict(zip(slots, watches, strict=True))
        device.decode(shape, full, watched)
        device.finish()
        for step in steps:
            cache.lengths[step.row] = step.position + 1
        self._decoded = {step.row for step in steps}
        return count

    def _slots(self, steps: Sequence[RowStep]) -> list[int]:
        return [self._device.cache.slots[step.row] for step in steps]

    def read_kv(self, row: int, start: int, stop: int) -> KvBlock:
        self._check_open()
        self._land_row(row)
        places.check_read(self._limits, self._device.cache.lengths, row, start, stop)
        return self._device.cache.read(row, start, stop, self._device.stream)

    def write_kv(self, row: int, start: int, block: KvBlock) -> None:
        self._check_open()
        self._land_row(row)
        places.check_write(self._limits, self._device.cache.lengths, row, start, block)
        self._device.cache.write(row, start, block, self._device.stream)

    def _land_row(self, row: int) -> None:
        if self._flight is not None and self._flight.row == row:
            self._land()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._device.close()

    def _check_watches(self, steps: Sequence[RowStep], watches: Sequence[Watch]) -> None:
        if not self._limits.shortlist:
            raise Unsupported("this engine was built without its sampling graph; build it again")
        if not steps or len(watches) != len(steps):
            raise RequestInvalid(f"{len(steps)} steps and {len(watches)} watches: give one each")
        for watch in watches:
            if len(watch.ids) > self._limits.watched:
                raise RequestInvalid(
                    f"{len(watch.ids)} watched tokens are more than {self._limits.watched}"
                )
            if len(watch.ids):
                places.check_tokens(self._limits, watch.ids)

    def _check_steps(self, steps: Sequence[RowStep]) -> None:
        places.check_steps(self._limits, self._device.cache.lengths, steps)
        for step in steps:
            self._device.bank.check_mix(step.mix)

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the engine is closed")

    def _check_chunk(self, row: int, tokens: NDArray[np.int64], start: int) -> None:
        self._check_open()
        places.check_chunk(self._limits, self._device.cache.lengths, row, tokens, start)
