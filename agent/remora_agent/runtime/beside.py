"""The one chunk of a prompt that the engine reads beside decode steps, where it can. For the step
thread; knows no scheduler and ends no request.
"""

from __future__ import annotations

import logging
import time

import numpy as np
from numpy.typing import NDArray

from remora_agent.engine.protocol import Engine
from remora_agent.runtime.embedding import Embedding
from remora_agent.runtime.request import Request
from remora_agent.runtime.work import PrefillChunk, Work
from remora_contract.errors import RemoraError

log = logging.getLogger(__name__)


class Beside:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._began_s = 0.0
        self.work: PrefillChunk | None = None  # what was begun and is not ended
        self._ended: PrefillChunk | None = None  # what was ended last

    def begin(self, work: PrefillChunk, request: Request) -> bool:
        """False where the chunk is to be read alone: the engine cannot, or did not, begin it, or
        more is wanted than the last token's logits."""
        if not self._engine.limits.overlaps or isinstance(request.answer, Embedding):
            return False
        if not work.again and request.generating.request.scoring.prompt_top is not None:
            return False
        text, mix = request.text, request.mix_at(work.start)
        tokens = np.asarray(text[work.start : work.stop], np.int64)
        self._began_s = time.perf_counter()
        try:
            self._engine.begin_prefill(work.row, tokens, work.start, mix, len(text))
        except RemoraError as e:
            log.warning("engine.not_beside", extra={"cause": str(e)})
            return False
        self.work = work
        return True

    def landed(self, *, wait: bool) -> PrefillChunk | None:
        """What was begun, once `end` would not wait, or when it may `wait`."""
        if self.work is None or not (wait or self._engine.prefill_ready()):
            return None
        return self.work

    def end(self) -> NDArray[np.float32]:
        """The logits [vocab] after its last token. Waits. Raises what the engine raises; it is over
        in any case."""
        self._ended, self.work = self.work, None
        return self._engine.end_prefill()

    def seconds(self, work: Work, engine_s: float) -> float:
        """What `work` took, of which the last call of the engine took `engine_s`."""
        return time.perf_counter() - self._began_s if work is self._ended else engine_s
