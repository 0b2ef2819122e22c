"""What an engine is to the rest of the agent: rows of a KV cache, resident adapters, two steps.

The scheduler decides which row does what; an engine only computes. It is driven by one thread.
Backends: `remora_agent.engine.ort`; later TensorRT. One conformance suite runs on all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from remora_agent.bank.weights import AdapterWeights
from remora_contract.errors import Unsupported

_NO_OVERLAP = "this engine reads no prompt beside decode steps"


@dataclass(frozen=True)
class EngineLimits:
    rows: int  # sequences in flight
    context: int  # tokens a row's cache holds
    vocab: int
    max_bank_rank: int  # sum of ranks of resident adapters; 0: no adapters
    scored: int = 0  # tokens of one `score`; 0: the engine cannot
    hidden: int = 0  # width of the states that `embed` returns; 0: the engine cannot
    kv_token_bytes: int = 0  # keys and values of one token in host memory; 0: not counted there
    copies_kv: bool = False  # read_kv and write_kv work
    shortlist: int = 0  # tokens a row that `decode_shortlist` returns; 0: the engine cannot
    watched: int = 0  # further tokens of a row whose logits it returns, at most
    overlaps: bool = False  # begin_prefill works
    switch: int | None = None  # a row of more tokens is turned otherwise, all of it; None: never


@dataclass(frozen=True)
class MixEntry:
    """One resident adapter in a row's mix."""

    handle: int
    weight: float


# What a row's tokens go through, in addition to the base: empty is the base model alone.
Mix = tuple[MixEntry, ...]


@dataclass(frozen=True)
class RowStep:
    """One token of one row: `token` is written to the cache at `position`."""

    row: int
    token: int
    position: int
    mix: Mix = ()
    length: int | None = None  # as `Engine.prefill`'s; None: position + 1


@dataclass(frozen=True)
class Watch:
    """What a row's draw needs of its logits beside the largest."""

    ids: NDArray[np.int64]  # [m], distinct
    temperature: float = 1.0  # above 0, a normal float32


@dataclass(frozen=True)
class Shortlist:
    """What a token is drawn from, of the logits of each row of one step, as the graph gives them.

    A tail is a sum over the tokens outside `ids`, relative to the largest logit; its rounding is
    the backend's. NaN or infinite where the logits were.
    """

    ids: NDArray[np.int32]  # [rows, limits.shortlist]
    logits: NDArray[np.float32]  # of `ids`, largest first
    watched: NDArray[np.float32]  # [rows, at least m]: of each watch's ids, in their order
    tail: NDArray[np.float32]  # [rows]: sum of exp(logit - max)
    tail_at: NDArray[np.float32]  # [rows]: sum of exp((logit - max) / temperature)


@dataclass(frozen=True)
class KvBlock:
    """Keys and values of consecutive positions; only the engine that made it knows the layout."""

    tokens: int
    arrays: tuple[NDArray[Any], ...]

    @property
    def bytes(self) -> int:
        return sum(a.nbytes for a in self.arrays)


class OneThingAtATime:
    """Of engines that read no prompt beside decode steps."""

    def begin_prefill(
        self,
        row: int,
        tokens: NDArray[np.int64],
        start: int,
        mix: Mix = (),
        length: int | None = None,
    ) -> None:
        raise Unsupported(_NO_OVERLAP)

    def prefill_ready(self) -> bool:
        raise Unsupported(_NO_OVERLAP)

    def end_prefill(self) -> NDArray[np.float32]:
        raise Unsupported(_NO_OVERLAP)


class Engine(Protocol):
    """Of a model that turns long sequences otherwise (`limits.switch`) a row holds keys of one kind
    only. `length` says how many tokens the sequence has that a call's are a part of; None: they end
    it. A row that grows past the switch is read from its start again.
    """

    @property
    def backend(self) -> str: ...

    @property
    def digest(self) -> str:
        """Identity of the built engine: build key and bytes."""
        ...

    @property
    def limits(self) -> EngineLimits: ...

    def prepare(self, weights: AdapterWeights) -> AdapterWeights:
        """The same adapter with what `add_adapter` would spend its time on done ahead, in memory of
        at most its `bank_bytes`. Any thread, also while a step runs. Raises AdapterInvalid."""
        ...

    def add_adapter(self, weights: AdapterWeights) -> int:
        """Makes an adapter resident and returns its handle.

        Raises Exhausted when the ranks would exceed `max_bank_rank`, AdapterInvalid when a target
        does not exist or has another shape. May run while no step runs, never during one.
        """
        ...

    def remove_adapter(self, handle: int) -> None:
        """Frees it at once; the caller holds no row that uses it. Raises NotFound."""
        ...

    def prefill(
        self,
        row: int,
        tokens: NDArray[np.int64],
        start: int,
        mix: Mix = (),
        length: int | None = None,
    ) -> NDArray[np.float32]:
        """Reads tokens [s] into `row` at positions start..start+s-1, start <= what the row holds.

        Returns the logits [vocab] after the last one. Chunks of one prompt are consecutive calls.
        Raises PromptTooLong past `context`, EngineFault when the backend fails.
        """
        ...

    def begin_prefill(
        self,
        row: int,
        tokens: NDArray[np.int64],
        start: int,
        mix: Mix = (),
        length: int | None = None,
    ) -> None:
        """Begins what `prefill` does, and returns: steps of other rows may be computed meanwhile,
        and answer as if it had been done before or after them. One prompt at a time; what cannot be
        done beside it waits for it. Raises as `prefill` does, Unsupported where `limits.overlaps`
        is not set."""
        ...

    def prefill_ready(self) -> bool:
        """Whether `end_prefill` would not wait. To be asked again and again: it drives a prompt of
        several chunks. Raises RequestInvalid when none was begun."""
        ...

    def end_prefill(self) -> NDArray[np.float32]:
        """What `prefill` returns of the prompt that was begun, or raises. Waits for it."""
        ...

    def decode(self, steps: Sequence[RowStep]) -> NDArray[np.float32]:
        """One token for each given row (distinct rows, any order); logits [len(steps), vocab].

        Rows that are not named keep their cache, whatever the backend computes beside them.
        """
        ...

    def decode_shortlist(self, steps: Sequence[RowStep], watches: Sequence[Watch]) -> Shortlist:
        """As `decode`, and only what `watches`, one for each step, need of the logits; each watches
        `limits.watched` tokens at most. Raises Unsupported where the engine cannot."""
        ...

    def step_logits(self, index: int) -> NDArray[np.float32]:
        """All logits [vocab] of the `index`-th step of the last `decode_shortlist`, as `decode`
        would have returned them; until anything else is computed. Raises Unsupported."""
        ...

    def read_kv(self, row: int, start: int, stop: int) -> KvBlock:
        """A copy of the keys and values of positions start..stop-1, which `row` holds.

        Raises RequestInvalid outside what the row holds, Unsupported when the engine cannot.
        """
        ...

    def write_kv(self, row: int, start: int, block: KvBlock) -> None:
        """Puts a copy of this engine's read_kv back at positions `start`.. of any row; the row
        then holds start + block.tokens tokens. `start` is where the block was read, because keys
        carry their position, and at most what the row holds.

        Raises RequestInvalid, PromptTooLong, Unsupported.
        """
        ...

    def score(
        self,
        row: int,
        tokens: NDArray[np.int64],
        start: int,
        mix: Mix = (),
        length: int | None = None,
    ) -> NDArray[np.float32]:
        """As `prefill`, and the logits [s, vocab] after every token; 1 <= s <= `limits.scored`.

        For a prompt's logprobs and for proving drafted tokens: a row may be taken back to any
        position afterwards. Raises Unsupported where the engine cannot.
        """
        ...

    def embed(
        self,
        row: int,
        tokens: NDArray[np.int64],
        start: int,
        mix: Mix = (),
        length: int | None = None,
    ) -> NDArray[np.float32]:
        """As `prefill`, and the states [s, hidden] after the final norm instead of logits.

        Raises Unsupported where the engine cannot.
        """
        ...

    def close(self) -> None:
        """Frees everything; later calls raise Unavailable."""
        ...
