"""One loaded model and its persistent bindings: what is bound stays bound until it changes.

Knows shapes and memory, no rows' lengths and no adapters' names beyond the arrays it is handed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from remora_agent.engine.ort import names
from remora_agent.engine.ort.faults import fault
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
class Ends:
    """Of each row [count]: the position of its last token, and how many tokens its sequence has."""

    positions: NDArray[np.int64]
    lengths: NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """What a step binds beyond its rows' factors: `embed` [count, s, hidden] is added to the
    tokens' embeddings, `experts` are adapters on experts."""

    embed: NDArray[np.float32] | None = None
    experts: Lora = field(default_factory=dict)


class Asked(Enum):
    """What a step returns."""

    LAST = "last"  # logits [count, vocab] after each row's last token
    EVERY = "every"  # logits [count * s, vocab] after every token
    STATES = "states"  # states [count * s, hidden] of every token after the final norm


class Session:
    """A model file of the built engine, loaded as it was optimised at build."""

    def __init__(self, path: Path, threads: int | None, vocab: int, hidden: int) -> None:
        """Raises EngineFault when the runtime cannot load it, Exhausted without the memory."""
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
            raise fault(e, f"onnxruntime {ort.__version__} cannot load {path}") from e
        self._widths = {Asked.LAST: vocab, Asked.EVERY: vocab, Asked.STATES: hidden}
        self._inputs = frozenset(i.name for i in self._session.get_inputs())
        self._bound: dict[tuple[Rows, Asked], _Binding] = {}

    def run(
        self,
        cache: KvCache,
        rows: Rows,
        tokens: NDArray[np.int64],
        ends: Ends,
        lora: Lora | None,
        grouped: bool,
        more: Step | None = None,
        asked: Asked = Asked.LAST,
    ) -> NDArray[np.float32]:
        """One step: tokens [count, s] whose last ones go to the positions that `ends` says.

        `lora` holds arrays of one group, or, `grouped`, of one group per row. Returns what is
        `asked`; LAST in memory that the next call for the same rows overwrites. Raises EngineFault,
        Exhausted when the runtime has no memory for the step, MemoryError when numpy has none.
        """
        try:
            binding = self._binding(cache, rows, asked)
            binding.set_step(tokens, ends, grouped)
            if names.SLOT_EMBED in self._inputs:
                binding.set_embed(None if more is None else more.embed, self._widths[Asked.STATES])
            if lora is not None:
                binding.set_lora(lora)
            if more is not None:
                binding.set_experts(more.experts)
        except MemoryError:
            self._bound.pop((rows, asked), None)  # half changed
            raise
        try:
            self._session.run_with_iobinding(binding.io)
        except Exception as e:  # as above
            raise fault(e, f"onnxruntime failed in a step of rows {rows}") from e
        return binding.output.take()

    def _binding(self, cache: KvCache, rows: Rows, asked: Asked) -> _Binding:
        binding = self._bound.get((rows, asked))
        if binding is None:
            output = _Output(asked, rows.count, self._widths[asked])
            binding = _Binding(self._session, cache, rows, output, self._inputs)
            self._bound[rows, asked] = binding
        return binding

    def unbind(self, gone: list[Lora]) -> None:
        """Lets go of adapter arrays that are no longer resident."""
        stale = {id(lora) for lora in gone}
        for key in [k for k, b in self._bound.items() if id(b.lora) in stale]:
            del self._bound[key]


class _Output:
    """Which tokens of a step give what is asked, and the memory that it goes to. The logits of the
    last tokens have theirs for good, as every step needs it; many tokens' is given away."""

    def __init__(self, asked: Asked, count: int, width: int) -> None:
        self._asked = asked
        self._count = count
        self._width = width
        self._states = zeros((count,), np.int64)
        self._logits = Buffer(np.arange(count, dtype=np.int64))
        self._result: Buffer | None = None
        self._tokens = 0  # in a row

    def bind(self, io: ort.IOBinding, tokens: int) -> None:
        """For a step of `tokens` a row."""
        last = self._asked is Asked.LAST
        if tokens != self._tokens:
            ends = np.arange(1, self._count + 1) * tokens - 1
            chosen = ends if last else np.arange(self._count * tokens)
            self._states = Buffer(chosen.astype(np.int64))
            if self._asked is Asked.EVERY:  # of states, logits nobody reads
                self._logits = Buffer(chosen.astype(np.int64))
            io.bind_ortvalue_input(names.STATE_INDEX, self._states.value)
            io.bind_ortvalue_input(names.LOGITS_INDEX, self._logits.value)
            self._tokens = tokens
            if not last:  # what a step that failed has not given away has another length
                self._result = None
        if self._result is None:
            self._result = zeros((len(self._states.array), self._width), np.float32)
            output = names.STATES if self._asked is Asked.STATES else targets.LOGITS
            io.bind_ortvalue_output(output, self._result.value)

    def take(self) -> NDArray[np.float32]:
        """What the step has put there."""
        if self._result is None:
            raise EngineFault("no step has run")
        result: NDArray[np.float32] = self._result.array
        if self._asked is not Asked.LAST:
            self._result = None
        return result


class _Binding:
    """Inputs and outputs of one range of rows, on memory that is changed in place."""

    def __init__(
        self,
        session: ort.InferenceSession,
        cache: KvCache,
        rows: Rows,
        output: _Output,
        taken: frozenset[str],
    ) -> None:
        count = rows.count
        self._taken = taken
        self.io = session.io_binding()
        self.lora: Lora | None = None
        self._experts: Lora | None = None
        self.output = output
        self._tokens = zeros((1, count), np.int64)
        self._batch_shape = Buffer(np.array([count, 1, -1], np.int64))
        self._group_shape = Buffer(np.array([1, count, -1], np.int64))
        self._last_position = zeros((count,), np.int32)
        self._total_length = zeros((), np.int32)
        self._last_index = zeros((count, 1), np.int64)
        self._length = zeros((count, 1), np.int64)
        self._positions: Buffer | None = None  # bound with the first step
        self._embed: Buffer | None = None  # the same
        inputs = {
            targets.INPUT_IDS: self._tokens,
            names.BATCH_SHAPE: self._batch_shape,
            names.GROUP_SHAPE: self._group_shape,
            names.LAST_POSITION: self._last_position,
            names.TOTAL_LENGTH: self._total_length,
            targets.LAST_INDEX: self._last_index,
            targets.SEQUENCE_LENGTH: self._length,
        }
        # Held here because the runtime only borrows the memory.
        self._cache = cache.view(rows.first, count)
        for name, buffer in {**inputs, **self._cache}.items():
            if name in taken:
                self.io.bind_ortvalue_input(name, buffer.value)
        for name, buffer in self._cache.items():
            self.io.bind_ortvalue_output(present_name(name), buffer.value)

    def set_step(self, tokens: NDArray[np.int64], ends: Ends, grouped: bool) -> None:
        count, s = tokens.shape
        groups = count if grouped else 1
        shape = (groups, count * s // groups)
        if self._tokens.array.shape != shape:
            self._tokens = zeros(shape, np.int64)
            self.io.bind_ortvalue_input(targets.INPUT_IDS, self._tokens.value)
        self._tokens.array[...] = tokens.reshape(shape)
        self._batch_shape.array[:2] = tokens.shape
        self._group_shape.array[:2] = shape
        self._last_position.array[...] = ends.positions
        self._total_length.array[...] = ends.positions.max() + 1
        if targets.POSITION_IDS in self._taken:
            self._set_positions(ends.positions, s)
        self._last_index.array[...] = s - 1
        self._length.array[:, 0] = ends.lengths
        self.output.bind(self.io, s)

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
