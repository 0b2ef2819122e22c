"""One CUDA graph for each shape of a decode step: (rows, T of each group). Captured on the shape's
first use, replayed after. Owns contexts and graphs; knows nothing of what a step means.

The first step of a shape is enqueued as it is: TensorRT wants one run after a change of shapes
before a capture, and its answer is already the step's. Each graph has a context of its own, as
TensorRT advises, because a replay uses what its context held when it was captured. What TensorRT
does not let be captured (networks with loops, as of experts, may wait for the host) is enqueued
every time.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from remora_agent.engine.trt.contexts import Chain
from remora_agent.engine.trt.cuda import Cuda
from remora_agent.engine.trt.inputs import StepShape
from remora_contract.errors import RemoraError

log = logging.getLogger(__name__)

# Rows double from 1 to what is served (4 shapes of 8 rows, 9 of 256), times the layouts that a
# device's adapters need.
_KEPT = 32


@dataclass
class _Captured:
    context: Chain  # lives as long as its graph
    graph: int | None  # None: TensorRT does not let it be captured


class StepGraphs:
    def __init__(
        self,
        cuda: Cuda,
        stream: int,
        make: Callable[[StepShape], Chain],
        upload: Callable[[], None],
        kept: int = _KEPT,
    ) -> None:
        """`make` gives bound contexts; `upload` queues what comes before each step."""
        self._cuda = cuda
        self._stream = stream
        self._make = make
        self._upload = upload
        self._kept = kept
        self._captured: OrderedDict[StepShape, _Captured] = OrderedDict()

    def run(self, shape: StepShape) -> None:
        """Queues a step. Raises Exhausted, EngineFault; the shape then is as if never used."""
        known = self._captured.get(shape)
        if known is not None:
            self._captured.move_to_end(shape)
            if known.graph is None:
                self._step(known.context)
            else:
                self._cuda.launch(known.graph, self._stream)
            return
        context = self._make(shape)
        self._step(context)
        self._captured[shape] = _Captured(context, self._capture(context))
        while len(self._captured) > self._kept:
            # A graph may be destroyed only once it has run; its context with it.
            self._cuda.synchronize(self._stream)
            _, old = self._captured.popitem(last=False)
            if old.graph is not None:
                self._cuda.destroy_graph(old.graph)

    def close(self) -> None:
        """Waits for what is queued."""
        with ExitStack() as freeing:  # all of them, whichever fails
            freeing.callback(self._captured.clear)  # last: a context lives as long as its graph
            for old in self._captured.values():
                if old.graph is not None:
                    freeing.callback(self._cuda.destroy_graph, old.graph)
            freeing.callback(self._cuda.synchronize, self._stream)

    def _step(self, context: Chain) -> None:
        self._upload()
        context.enqueue(self._stream)

    def _capture(self, context: Chain) -> int | None:
        """None where TensorRT takes the same step only outside a capture."""
        try:
            self._cuda.begin_capture(self._stream)
            try:
                self._upload()
                taken = context.try_enqueue(self._stream)
            except RemoraError:
                self._cuda.abandon_capture(self._stream)
                raise
            if taken:
                return self._cuda.end_capture(self._stream)
            self._cuda.abandon_capture(self._stream)
            log.warning("engine.step_not_captured")
            return None
        except RemoraError:
            # The step itself is queued: its context must outlive it.
            self._cuda.synchronize(self._stream)
            raise
