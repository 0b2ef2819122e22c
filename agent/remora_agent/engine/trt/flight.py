"""A prompt that is read beside decode steps: chunk after chunk on a stream of its own, each begun
when the one before has run. Owns how far it has come and how it ended; knows no other row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from remora_agent.engine.places import Part
from remora_agent.engine.trt.device import Device
from remora_agent.engine.trt.inputs import Asked, Places, StepShape
from remora_contract.errors import RemoraError


def queue_chunk(device: Device, part: Part, asked: Asked) -> StepShape:
    """Queues a part of one row; the shape that says what it leaves. Raises Exhausted,
    EngineFault."""
    shape = StepShape(1, len(part), device.bank.bound([part.mix]), asked)
    at = Places(np.array([part.start]), np.array([part.whole]))
    device.fill(device.prompt, shape, part.tokens[None], at, {0: part.mix})
    device.read(part.row, shape)
    return shape


class Flight:
    """Driven by the engine's thread."""

    def __init__(self, device: Device, part: Part) -> None:
        self.row = part.row
        self._device = device
        self._left = part  # from the chunk under way on
        self._error: RemoraError | None = None
        self.has_landed = False

    def begin(self) -> None:
        """Queues the next chunk. Raises what `queue_chunk` does."""
        queue_chunk(self._device, self._left.cut(0, self._device.chunk), Asked.LAST)

    def ready(self) -> bool:
        """Whether `end` would not wait; begins the next chunk where one has run."""
        try:
            while not self.has_landed and self._device.has_read():
                self._next()
        except RemoraError as e:
            self._fail(e)
        return self.has_landed

    def land(self) -> None:
        """Waits for all of it; `end` says what went wrong."""
        try:
            while not self.has_landed:
                self._next()
        except RemoraError as e:
            self._fail(e)

    def end(self) -> NDArray[np.float32]:
        """Waits; the logits [vocab] after the last token. Raises EngineFault, Exhausted; the row
        then holds the chunks that ran."""
        self.land()
        if self._error is not None:
            raise self._error
        return self._logits

    def _next(self) -> None:
        """Takes what the chunk under way left, and begins the one behind it. Waits."""
        device = self._device
        device.finish_read()
        ran = self._left.cut(0, device.chunk)
        device.cache.lengths[self.row] = ran.stop
        self._left = self._left.cut(len(ran), len(self._left))
        if len(self._left):
            self.begin()
            return
        self._logits: NDArray[np.float32] = device.read_logits(1)[0]
        self.has_landed = True

    def _fail(self, error: RemoraError) -> None:
        self._error, self.has_landed = error, True
