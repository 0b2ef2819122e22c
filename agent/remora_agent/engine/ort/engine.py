"""The engine on ONNX Runtime: which rows compute together, through which adapters, on what memory.

Rows that lie between two computed rows are computed too; they write to the first position they do
not hold, which their own next token overwrites, so nothing is seen of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remora_agent.bank.weights import AdapterWeights
from remora_agent.engine import places
from remora_agent.engine.ort.bank import Bank
from remora_agent.engine.ort.expert_slots import ExpertSlots
from remora_agent.engine.ort.extras import Extras, uses_extras
from remora_agent.engine.ort.faults import survives_no_memory
from remora_agent.engine.ort.kv import KvCache
from remora_agent.engine.ort.names import BACKEND, MODEL
from remora_agent.engine.ort.packing import Packed
from remora_agent.engine.ort.session import Asked, Ends, Lora, Rows, Session, Step
from remora_agent.engine.ort.slots import RowSlots
from remora_agent.engine.protocol import (
    EngineLimits,
    KvBlock,
    Mix,
    OneThingAtATime,
    RowStep,
    Shortlist,
    Watch,
)
from remora_contract.bundle import GraphSpec
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import Unavailable, Unsupported

# Bounds the memory of one call: attention scores are [heads, chunk, length].
_PREFILL_CHUNK = 512
# What the products of int8 prompts read stays in the processor's caches.
_INT8_CHUNK = 128
_INT8_LEAST = 16  # tokens; the decoding model reads fewer faster


@dataclass(frozen=True)
class PrefillForm:
    """The model that reads prompts in int8, chunks of at least `least` tokens."""

    file: str
    least: int = _INT8_LEAST


@dataclass(frozen=True)
class EngineFiles:
    """What the build left: the model, and where there are such the one without adapters and the one
    that takes only factors on the layers' projections."""

    directory: Path
    digest: str
    base: str | None
    plain: str | None = None
    prefill: PrefillForm | None = None


class OrtEngine(OneThingAtATime):
    """See `engine.protocol.Engine`. Driven by one thread."""

    def __init__(
        self,
        files: EngineFiles,
        decoder: DecoderSpec,
        limits: EngineLimits,
        threads: int | None,
        graph: GraphSpec | None = None,
    ) -> None:
        """Loads what serves without adapters; the rest with the first adapter. EngineFault."""
        self._files = files
        self._limits = limits
        self._threads = threads
        self._decoder = decoder
        self._cache = KvCache(decoder, limits.rows, limits.context)
        self._extras = Extras.of(graph)
        self._bank = Bank(decoder, limits.max_bank_rank, limits.rows, self._extras)
        self._experts = ExpertSlots(decoder, self._bank.entries)
        self._slots: RowSlots | None = None
        self._slot_views: dict[tuple[Rows, int], Lora] = {}
        self._base: Session | None = None
        self._plain: Session | None = None
        self._full: Session | None = None
        self._prefill: Session | None = None
        self._closed = False
        if files.base is not None:
            self._base = self._load(files.base)
        elif limits.max_bank_rank:
            self._full = self._load(MODEL)
        else:
            self._base = self._load(MODEL)
        if files.prefill is not None:
            self._prefill = self._load(files.prefill.file)

    @property
    def backend(self) -> str:
        return BACKEND

    @property
    def digest(self) -> str:
        return self._files.digest

    @property
    def limits(self) -> EngineLimits:
        return self._limits

    def prepare(self, weights: AdapterWeights) -> AdapterWeights:
        return self._bank.prepare(weights)

    @survives_no_memory
    def add_adapter(self, weights: AdapterWeights) -> int:
        self._check_open()
        handle = self._bank.add(weights)
        self._adapted(uses_extras(weights))
        return handle

    def remove_adapter(self, handle: int) -> None:
        self._check_open()
        self._let_go(self._bank.remove(handle))
        self._experts.forget()

    @survives_no_memory
    def prefill(
        self,
        row: int,
        tokens: NDArray[np.int64],
        start: int,
        mix: Mix = (),
        length: int | None = None,
    ) -> NDArray[np.float32]:
        self._check_chunk(row, tokens, start)
        logits: NDArray[np.float32] = np.empty(0, np.float32)
        text = places.Part.of(row, tokens, start, mix, length)
        least = None if self._files.prefill is None else self._files.prefill.least
        for begin, end, int8 in chunks(len(tokens), least):
            # Of a chunk before the last nobody wants logits, and states need no head.
            asked = Asked.LAST if end == len(tokens) else Asked.STATES
            logits = self._read(text.cut(begin, end - begin), asked, int8)
        only: NDArray[np.float32] = logits[0].copy()
        return only

    @survives_no_memory
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
        return self._read(places.Part.of(row, tokens, start, mix, length), Asked.EVERY)

    @survives_no_memory
    def embed(
        self,
        row: int,
        tokens: NDArray[np.int64],
        start: int,
        mix: Mix = (),
        length: int | None = None,
    ) -> NDArray[np.float32]:
        self._check_chunk(row, tokens, start)
        text = places.Part.of(row, tokens, start, mix, length)
        states = np.empty((len(tokens), self._limits.hidden), np.float32)
        for begin in range(0, len(tokens), _PREFILL_CHUNK):
            part = text.cut(begin, _PREFILL_CHUNK)
            states[begin : begin + len(part)] = self._read(part, Asked.STATES)
        return states

    def _read(self, part: places.Part, asked: Asked, int8: bool = False) -> NDArray[np.float32]:
        """One call for several tokens of one row."""
        rows, tokens, mixes = Rows(part.row, 1), part.tokens[None], {part.row: part.mix}
        if int8:
            found = self._run_int8(part, asked)
        else:
            found = self._run(rows, tokens, _ends(part), mixes, asked)
        self._cache.lengths[part.row] = part.stop
        return found

    @survives_no_memory
    def decode(self, steps: Sequence[RowStep]) -> NDArray[np.float32]:
        self._check_open()
        if not steps:
            return np.empty((0, self._limits.vocab), np.float32)
        places.check_steps(self._limits, self._cache.lengths, steps)
        by_row = {step.row: step for step in steps}
        rows = Rows(min(by_row), max(by_row) - min(by_row) + 1)
        tokens = np.zeros((rows.count, 1), np.int64)
        positions = self._cache.lengths[rows.first : rows.first + rows.count].copy()
        lengths = positions + 1
        for step in steps:
            tokens[step.row - rows.first] = step.token
            positions[step.row - rows.first] = step.position
            lengths[step.row - rows.first] = step.position + 1
            if step.length is not None:
                lengths[step.row - rows.first] = step.length
        ends = Ends(positions, lengths)
        logits = self._run(rows, tokens, ends, {s.row: s.mix for s in steps})
        for step in steps:
            self._cache.lengths[step.row] = step.position + 1
        chosen: NDArray[np.float32] = logits[[step.row - rows.first for step in steps]]
        return chosen

    def decode_shortlist(self, steps: Sequence[RowStep], watches: Sequence[Watch]) -> Shortlist:
        raise Unsupported(f"{BACKEND} has its logits in host memory; use decode")

    def step_logits(self, index: int) -> NDArray[np.float32]:
        raise Unsupported(f"{BACKEND} has its logits in host memory; use decode")

    @survives_no_memory
    def read_kv(self, row: int, start: int, stop: int) -> KvBlock:
        self._check_open()
        places.check_read(self._limits, self._cache.lengths, row, start, stop)
        return self._cache.read(row, start, stop)

    @survives_no_memory
    def write_kv(self, row: int, start: int, block: KvBlock) -> None:
        self._check_open()
        places.check_write(self._limits, self._cache.lengths, row, start, block)
        self._cache.write(row, start, block)

    def drop_half_made(self) -> None:
        """After a step that numpy had no memory for: slots that may have been filled in part."""
        self._slots = None
        self._slot_views.clear()
        self._experts.forget()

    def close(self) -> None:
        self._closed = True
        self._base = self._plain = self._full = self._prefill = self._slots = None
        self._slot_views.clear()
        self._bank = Bank(self._decoder, 0)
        self._experts.forget()
        self._cache.clear()

    def _run(
        self,
        rows: Rows,
        tokens: NDArray[np.int64],
        ends: Ends,
        mixes: dict[int, Mix],
        asked: Asked = Asked.LAST,
    ) -> NDArray[np.float32]:
        """One call; `mixes` by row, of the rows whose result counts."""
        distinct = set(mixes.values())
        if self._base is not None and distinct == {()}:
            return self._base.run(self._cache, rows, tokens, ends, None, False, asked=asked)
        session = self._adapted(any(self._bank.uses_extras(mix) for mix in distinct))
        grouped = len(distinct) > 1
        lora = self._fill_slots(rows, mixes) if grouped else self._packed(next(iter(distinct)))
        more = Step(self._embedding_change(rows, tokens, mixes), self._experts_of(rows, mixes))
        return session.run(self._cache, rows, tokens, ends, lora, grouped, more, asked)

    def _run_int8(self, part: places.Part, asked: Asked) -> NDArray[np.float32]:
        """One chunk of one row's prompt. There is one graph for it, which adds nothing without an
        adapter."""
        assert self._prefill is not None  # else there are no such chunks
        rows, tokens = Rows(part.row, 1), part.tokens[None]
        lora = self._packed(part.mix) if self._limits.max_bank_rank else None
        more = Step(self._embedding_change(rows, tokens, {part.row: part.mix}))
        step = (self._cache, rows, tokens, _ends(part))
        return self._prefill.run(*step, lora, False, more, asked)

    def _experts_of(self, rows: Rows, mixes: dict[int, Mix]) -> Lora:
        """What rows bind of adapters on experts."""
        if not self._extras.experts:
            return {}
        return self._experts.bound(rows.count, {r - rows.first: m for r, m in mixes.items()})

    def _embedding_change(
        self, rows: Rows, tokens: NDArray[np.int64], mixes: dict[int, Mix]
    ) -> NDArray[np.float32] | None:
        """[count, s, hidden] that the rows' mixes add to the embedding; None for nothing."""
        if not self._extras.embed:
            return None
        total: NDArray[np.float32] | None = None
        for row, mix in mixes.items():
            at = row - rows.first
            change = self._bank.embedding_change(mix, tokens[at])
            if change is not None:
                if total is None:
                    total = np.zeros((*tokens.shape, self._decoder.hidden), np.float32)
                total[at] = change
        return total

    def _fill_slots(self, rows: Rows, mixes: dict[int, Mix]) -> Lora:
        """The row slots of `rows`, holding each row's mix."""
        if self._slots is None:
            self._slots = RowSlots(self._decoder, self._limits.rows, self._extras)
        wanted = [(row, self._packed(mix)) for row, mix in mixes.items()]
        self._slots.fill(wanted)
        key = (rows, self._slots.generation)
        if key not in self._slot_views:
            stale = [k for k in self._slot_views if k[1] != self._slots.generation]
            for old in stale:
                del self._slot_views[old]
            self._slot_views[key] = self._slots.view(rows.first, rows.count)
        return self._slot_views[key]

    def _packed(self, mix: Mix) -> Packed:
        packed = self._bank.packed(mix)
        self._let_go(self._bank.take_forgotten())
        return packed

    def _let_go(self, gone: list[Packed]) -> None:
        """No binding and no slot keeps the arrays of mixes that are no longer there."""
        for session in (self._plain, self._full, self._prefill):
            if gone and session is not None:
                session.unbind(list(gone))
        if self._slots is not None:
            for mix in gone:
                self._slots.forget(mix)

    def _adapted(self, extras: bool) -> Session:
        """The session for mixes with or without `extras`, the latter costing nothing of them."""
        if self._files.plain is not None and not extras:
            if self._plain is None:
                self._plain = self._load(self._files.plain)
            return self._plain
        if self._full is None:
            self._full = self._load(MODEL)
        return self._full

    def _load(self, name: str) -> Session:
        limits = self._limits
        return Session(self._files.directory / name, self._threads, limits.vocab, limits.hidden)

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the engine is closed")

    def _check_chunk(self, row: int, tokens: NDArray[np.int64], start: int) -> None:
        self._check_open()
        places.check_chunk(self._limits, self._cache.lengths, row, tokens, start)


def chunks(count: int, int8_least: int | None) -> list[tuple[int, int, bool]]:
    """(begin, end, whether in int8) of a prompt of `count` tokens; `int8_least` None: none is."""
    if int8_least is None:
        size = _PREFILL_CHUNK
        return [(at, min(at + size, count), False) for at in range(0, count, size)]
    ends = [(at, min(at + _INT8_CHUNK, count)) for at in range(0, count, _INT8_CHUNK)]
    return [(begin, end, end - begin >= int8_least) for begin, end in ends]


def _ends(part: places.Part) -> Ends:
    return Ends(np.array([part.stop - 1]), np.array([part.whole]))
