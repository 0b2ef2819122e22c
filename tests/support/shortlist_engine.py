"""The reference engine with its logits on a "device": ONNX Runtime runs the sampling graph on them.

What a real engine must keep to is checked: one watch a step, no more ids than the limit, and
logits read back only of the last step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import onnxruntime as ort

from remora_agent.engine.protocol import RowStep, Shortlist, Watch
from remora_agent.engine.trt.sampling_graph import LogitsType, sampling_graph
from tests.support.reference_engine import ReferenceEngine


@lru_cache
def session(vocab: int, shortlist: int, dtype: LogitsType = "float32") -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    graph = sampling_graph(vocab, shortlist, dtype)
    return ort.InferenceSession(graph.SerializeToString(), options, ["CPUExecutionProvider"])


def shortlisted(
    logits: np.ndarray, watches: Sequence[Watch], shortlist: int, room: int = 0
) -> Shortlist:
    """Of logits [rows, vocab] of float16 or float32; watched ids are padded as on a device."""
    width = max(room, *(len(w.ids) for w in watches))
    ids = np.zeros((len(watches), width), np.int64)
    for row, watch in zip(ids, watches, strict=True):
        row[: len(watch.ids)] = watch.ids
    feed = {
        "logits": logits,
        "watched_ids": ids,
        "temperature": np.array([[w.temperature] for w in watches], np.float32),
    }
    found = session(logits.shape[1], shortlist, logits.dtype.name).run(None, feed)
    return Shortlist(*found[:3], found[3][:, 0], found[4][:, 0])


class ShortlistEngine(ReferenceEngine):
    def __init__(self, rows: int, context: int, vocab: int, shortlist: int, watched: int = 64):
        super().__init__(rows, context, vocab)
        self._limits = replace(self._limits, shortlist=min(shortlist, vocab), watched=watched)
        self._last: np.ndarray | None = None
        self.read_back = 0  # rows
        self.shortlisted = 0  # rows

    def decode_shortlist(self, steps: Sequence[RowStep], watches: Sequence[Watch]) -> Shortlist:
        assert len(steps) == len(watches)
        assert all(len(w.ids) <= self._limits.watched for w in watches)
        assert all(len(np.unique(w.ids)) == len(w.ids) and w.temperature > 0 for w in watches)
        logits = self.decode(steps)
        self._last = logits
        self.shortlisted += len(steps)
        return shortlisted(logits, watches, self._limits.shortlist, self._limits.watched)

    def step_logits(self, index: int) -> np.ndarray:
        assert self._last is not None, "something was computed since"
        self.read_back += 1
        return self._last[index]

    def _begin_step(self) -> None:
        super()._begin_step()
        self._last = None
