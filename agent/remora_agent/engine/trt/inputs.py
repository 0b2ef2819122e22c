"""What changes with every step, in one block: written in pinned memory, copied to the device by one
call, at addresses that never change.

    input_ids, position_ids [b, s] int64    state_index [n], logits_index [k] int64
    last_index, sequence_length [b, 1] int64
    lora_gate.GROUP [b, 1, T]

The block has room for the most rows, tokens and columns; a smaller step packs each tensor at its
place's beginning. What rows hold for longer (`row_vectors`) stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora_agent.engine.trt.cuda import Cuda
from remora_agent.engine.trt.memory import Memory
from remora_agent.engine.trt.positions import LOGITS_INDEX, STATE_INDEX
from remora_agent.engine.trt.row_vectors import RowVectors
from remora_contract import targets
from remora_contract.targets import Group
from remora_contract.trt_memory import aligned

_INT64 = np.dtype(np.int64)


class Asked(Enum):
    """What of a step is wanted; all but LAST are of one row."""

    LAST = "logits after each row's last token"
    EVERY = "logits after every token"
    STATES = "states of every token"


@dataclass(frozen=True)
class StepShape:
    """b, s, and T of each group of the bank."""

    rows: int
    tokens: int
    bound: tuple[int, ...]
    asked: Asked = Asked.LAST

    @property
    def states(self) -> int:
        """n"""
        return self.rows if self.asked is Asked.LAST else self.tokens

    @property
    def logits(self) -> int:
        """k: of states alone the least that there may be"""
        return 1 if self.asked is Asked.STATES else self.states


@dataclass(frozen=True)
class Places:
    """Of each row [b]: where its tokens begin, and how many its whole sequence has."""

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]


class StepInputs:
    def __init__(
        self,
        cuda: Cuda,
        memory: Memory,
        most: StepShape,
        groups: Sequence[Group],
        dtype: np.dtype[Any],
        vectors: RowVectors,
    ) -> None:
        """Raises Exhausted."""
        self._cuda = cuda
        self.vectors = vectors
        self._gates = tuple(targets.lora_gate(g) for g in groups)
        self._dtype = dtype
        self._places: dict[str, int] = {}
        size = 0
        for name, shape in self._block(most).items():
            self._places[name] = size
            size += aligned(int(np.prod(shape)) * self._type(name).itemsize)
        self._size = size
        self._host = memory.pinned(size, "a step's inputs")
        self._device = memory.device(size, "a step's inputs")

    def shapes(self, step: StepShape) -> dict[str, tuple[int, ...]]:
        """By input name."""
        return self._block(step) | self.vectors.shapes(step.rows)

    def _block(self, step: StepShape) -> dict[str, tuple[int, ...]]:
        grid = (step.rows, step.tokens)
        fixed = {
            targets.INPUT_IDS: grid,
            targets.POSITION_IDS: grid,
            STATE_INDEX: (step.states,),
            LOGITS_INDEX: (step.logits,),
            targets.LAST_INDEX: (step.rows, 1),
            targets.SEQUENCE_LENGTH: (step.rows, 1),
        }
        gates = zip(self._gates, step.bound, strict=True)
        return {**fixed, **{name: (step.rows, 1, t) for name, t in gates}}

    def addresses(self) -> dict[str, int]:
        block = {name: self._device + at for name, at in self._places.items()}
        return block | dict(self.vectors.addresses())

    def write(self, step: StepShape, tokens: NDArray[np.int64], at: Places) -> list[NDArray[Any]]:
        """Puts tokens [b, s] in place; the gates [b, T], all zeros, to be filled. The step before
        must have run."""
        arrays = {
            name: self._host.array(shape, self._type(name), self._places[name])
            for name, shape in self._block(step).items()
        }
        arrays[targets.INPUT_IDS][...] = tokens
        arrays[targets.POSITION_IDS][...] = at.starts[:, None] + np.arange(step.tokens)
        last = np.arange(1, step.rows + 1) * step.tokens - 1  # of the rows' tokens one by one
        arrays[STATE_INDEX][...] = last if step.asked is Asked.LAST else np.arange(step.states)
        arrays[targets.LAST_INDEX][...] = step.tokens - 1
        arrays[targets.SEQUENCE_LENGTH][:, 0] = at.lengths
        arrays[LOGITS_INDEX][...] = np.arange(step.logits)
        gates = [arrays[name][:, 0] for name in self._gates]
        for gate in gates:
            gate[...] = 0
        return gates

    def upload(self, stream: int) -> None:
        """Queues the one copy."""
        self._cuda.copy(self._device, self._host.address, self._size, "to_device", stream)

    def _type(self, name: str) -> np.dtype[Any]:
        return self._dtype if name in self._gates else _INT64
