"""One loaded model and its persistent bindings: what is bound stays bound until it changes.

Knows shapes and memory, no rows' lengths and no adapters' names beyond the arrays it is handed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from remora_agent.engine.ort import names
from remora_agent.engine.ort.kv import KvCache, present_name
from remora_agent.engine.ort.values import Buffer, zeros
from remora_contract import targets
from remora_contract.errors import EngineFault

_LOG_ERRORS = 3

Lora = Mapping[str, Buffer]


@dataclass(frozen=True)
class Rows:
    """Rows first..first+count-1 of the cache."""

    first: int
    count: int


@dataclass(frozen=True)
class Step:
    """What a step binds beyond its rows' factors: `embed` [count, s, hidden] is added to the
    tokens' embeddings, `experts` are adapters on experts."""

    embed: NDArray[np.float32] | None = None
    experts: Lora = field(default_factory=dict)


class Session:
    """A model file of the built engine, loaded as it was optimised at build."""

    def __init__(self, path: Path, threads: int | None, vocab: int) -> None:
        """Raises EngineFault when the runtime cannot load it."""
        options = ort.SessionOptions()
        options.log_severity_level = _LOG_ERRORS
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as e:  # the runtime's exceptions share no base class
            raise EngineFault(f"onnxruntime {ort.__version__} cannot load {path}: {e}") from e
        self._hidden = _width(self._session, names.SLOT_EMBED)
        self._vocab = vocab
        self._inputs = frozenset(i.name for i in self._session.get_inputs())
        self._bound: dict[Rows, _Binding] = {}

    def run(
        self,
        cache: KvCache,
        rows: Rows,
        tokens: NDArray[np.int64],
        last_positions: NDArray[np.int64],
        lora: Lora | None,
        grouped: bool,
        more: Step | None = None,
    ) -> NDArray[np.float32]:
        """One step: tokens [count, s] whose last ones go to `last_positions` [count].

        `lora` holds arrays of one group, or, `grouped`, of one group per row. Returns logits
        [count, vocab] in memory that the next call for the same rows overwrites. EngineFault.
        """
        binding = self._bound.get(rows)
        if binding is None:
            binding = _Binding(self._session, cache, rows, self._vocab, self._inputs)
            self._bound[rows] = binding
        binding.set_step(tokens, last_positions, grouped)
        if self._hidden:
            binding.set_embed(None if more is None else more.embed, self._hidden)
        if lora is not None:
            binding.set_lora(lora)
        if more is not None:
            binding.set_experts(more.experts)
        try:
            self._session.run_with_iobinding(binding.io)
        except Exception as e:  # as above
            raise EngineFault(f"onnxruntime failed in a step of rows {rows}: {e}") from e
        return binding.logits.array

    def unbind(self, gone: list[Lora]) -> None:
        """Lets go of adapter arrays that are no longer resident."""
        stale = {id(lora) for lora in gone}
        for rows in [r for r, b in self._bound.items() if id(b.lora) in stale]:
            del self._bound[rows]


class _Binding:
    """Inputs and outputs of one range of rows, on memory that is changed in place."""

    def __init__(
        self,
        session: ort.InferenceSession,
        cache: KvCache,
        rows: Rows,
        vocab: int,
        taken: frozenset[str],
    ) -> None:
        count = rows.count
        self._taken = taken
        self.io = session.io_binding()
        self.lora: Lora | None = None
        self._experts: Lora | None = None
        self.logits = zeros((count, vocab), np.float32)
        self._tokens = zeros((1, count), np.int64)
        self._batch_shape = Buffer(np.array([count, 1, -1], np.int64))
        self._group_shape = Buffer(np.array([1, count, -1], np.int64))
        self._last_position = zeros((count,), np.int32)
        self._total_length = zeros((), np.int32)
        self._last_index = zeros((count, 1), np.int64)
        self._positions: Buffer | None = None  # bound with the first step
        self._embed: Buffer | None = None  # the same
        inputs = {
            targets.INPUT_IDS: self._tokens,
            names.BATCH_SHAPE: self._batch_shape,
            names.GROUP_SHAPE: self._group_shape,
            names.LAST_POSITION: self._last_position,
            names.TOTAL_LENGTH: self._total_length,
            targets.LAST_INDEX: self._last_index,
        }
        # Held here because the runtime only borrows the memory.
        self._cache = cache.view(rows.first, count)
        for name, buffer in {**inputs, **self._cache}.items():
            self.io.bind_ortvalue_input(name, buffer.value)
        for name, buffer in self._cache.items():
            self.io.bind_ortvalue_output(present_name(name), buffer.value)
        self.io.bind_ortvalue_output(targets.LOGITS, self.logits.value)

    def set_step(
        self, tokens: NDArray[np.int64], last_positions: NDArray[np.int64], grouped: bool
    ) -> None:
        count, s = tokens.shape
        groups = count if grouped else 1
        shape = (groups, count * s // groups)
        if self._tokens.array.shape != shape:
            self._tokens = zeros(shape, np.int64)
            self.io.bind_ortvalue_input(targets.INPUT_IDS, self._tokens.value)
        self._tokens.array[...] = tokens.reshape(shape)
        self._batch_shape.array[:2] = tokens.shape
        self._group_shape.array[:2] = shape
        self._last_position.array[...] = last_positions
        self._total_length.array[...] = last_positions.max() + 1
        if targets.POSITION_IDS in self._taken:
            self._set_positions(last_positions, s)
        self._last_index.array[...] = s - 1

    def _set_positions(self, last_positions: NDArray[np.int64], s: int) -> None:
        if self._positions is None or self._positions.array.shape[1] != s:
            self._positions = zeros((len(last_positions), s), np.int64)
            self.io.bind_ortvalue_input(targets.POSITION_IDS, self._positions.value)
        self._positions.array[...] = last_positions[:, None] + np.arange(1 - s, 1)

    def set_embed(self, embed: NDArray[np.float32] | None, hidden: int) -> None:
        shape = (*self._tokens.array.shape, hidden)
        if self._embed is None or self._embed.array.shape != shape:
            self._embed = zeros(shape, np.float32)
            self.io.bind_ortvalue_input(names.SLOT_EMBED, self._embed.value)
        self._embed.array[...] = 0 if embed is None else embed.reshape(shape)

    def set_experts(self, experts: Lora) -> None:
        if self._experts is not experts:
            for name, buffer in experts.items():
                if name in self._taken:
                    self.io.bind_ortvalue_input(name, buffer.value)
            self._experts = experts

    def set_lora(self, lora: Lora) -> None:
        """Of the arrays, those that this graph reads."""
        if self.lora is not lora:
            for name, buffer in lora.items():
                if name in self._taken:
                    self.io.bind_ortvalue_input(name, buffer.value)
            self.lora = lora


def _width(session: ort.InferenceSession, name: str) -> int:
    """Of an input's last dimension; 0 when there is no such input."""
    found = next((i for i in session.get_inputs() if i.name == name), None)
    return 0 if found is None else int(found.shape[-1])
