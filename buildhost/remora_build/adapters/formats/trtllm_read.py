"""Reads TensorRT-LLM's adapters (`trtllm` says how they are stored), one row at a time.

Every number is checked against the base before a row is read, and everything a row stores is either
carried or must be zero. Owns the refusals; the algebra is in `trtllm_rows`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from remora_build.adapters.formats.carried import Carried, check_finite
from remora_build.adapters.formats.manifest import manifest_for, restore
from remora_build.adapters.formats.npy import NpyFile, open_npy, stored_dtype
from remora_build.adapters.formats.registry import GateUpOrder
from remora_build.adapters.formats.trtllm import CONFIG, WEIGHTS, rank_file
from remora_build.adapters.formats.trtllm_modules import (
    BY_ID,
    GATE_UP,
    MODULES,
    Module,
    Shape,
    local_shape,
    shape_of,
)
from remora_build.adapters.formats.trtllm_rows import Row, factors_of, join, row_from, row_values
from remora_build.adapters.sidecar import Factor
from remora_contract.adapter import MAX_RANK
from remora_contract.bundle import Bundle
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import AdapterInvalid, Unsupported
from remora_contract.targets import AdapterTarget

_CHUNK_ITEMS = 1 << 20
_OF_A_RANK = re.compile(r"model\.lora_(weights|config)\.(0|[1-9][0-9]{0,3})\.npy")


@dataclass(frozen=True)
class Pair:
    """One rank's files, or the whole adapter's: weights [rows, width], config [rows, 3 or 4]."""

    weights: NpyFile
    config: NpyFile

    @property
    def rows(self) -> int:
        return self.config.shape[-2]

    @property
    def width(self) -> int:
        return self.weights.shape[-1]

    def table(self) -> NDArray[np.int32]:
        """[rows, 3 or 4]"""
        rows, columns = self.config.shape[-2:]
        with self.config.path.open("rb") as f:
            return self.config.items(f, 0, rows * columns).reshape(rows, columns)


@dataclass(frozen=True)
class Entry:
    """A line of LoraConfig that this base has a place for."""

    index: int
    module: Module
    layer: int
    rank: int
    dora: bool
    whole: Shape
    local: Shape  # of what each file holds of it

    @property
    def values(self) -> int:
        return row_values(self.rank, self.local, self.dora)


def read_trtllm(directory: Path, bundle: Bundle, gate_up: GateUpOrder | None) -> Carried:
    """Raises AdapterInvalid naming file and row, Unsupported for a module that a decoder's adapter
    cannot hold, ArtifactInvalid or DocumentInvalid (files changed since Remora wrote them), Refused
    (another base)."""
    manifest = manifest_for(directory, "trtllm", bundle)
    pairs = _pairs(directory, bundle.decoder)
    entries = _entries(pairs, bundle.decoder, gate_up)
    try:
        factors = _factors(pairs, entries, gate_up)
    except OSError as e:
        raise AdapterInvalid(f"{directory} cannot be read: {e.strerror or e}") from e
    return Carried(factors) if manifest is None else restore(manifest, factors, directory)


def _factors(
    pairs: Sequence[Pair], entries: Sequence[Entry], gate_up: GateUpOrder | None
) -> dict[AdapterTarget, Factor]:
    factors: dict[AdapterTarget, Factor] = {}
    for entry, row in _rows(pairs, entries):
        for target, factor in factors_of(row, entry.whole, 1.0, gate_up).items():
            if target in factors:
                raise AdapterInvalid(
                    f"{_where(pairs[0], entry.index)}: {row.name} adapts {target.name()} a second "
                    "time, which one adapter cannot"
                )
            factors[target] = factor
    return factors


def _pairs(directory: Path, decoder: DecoderSpec) -> list[Pair]:
    """Of rank 0 and up, or the whole adapter's. Raises AdapterInvalid for a set that is incomplete
    or whose shapes cannot belong together."""
    pairs = []
    for weights, config in _names(directory):
        pair = Pair(open_npy(directory / weights), open_npy(directory / config))
        stored_dtype(pair.weights)
        _check_shapes(pair, decoder)
        pairs.append(pair)
    tables = [pair.table() for pair in pairs]
    for pair, table in zip(pairs, tables, strict=True):
        if not np.array_equal(table, tables[0]):
            raise AdapterInvalid(
                f"{pair.config.path} differs from {pairs[0].config.path}: every rank must list the "
                "same modules"
            )
    return pairs


def _names(directory: Path) -> list[tuple[str, str]]:
    found = {p.name for p in directory.iterdir()}
    ranks = {int(match[2]) for name in found if (match := _OF_A_RANK.fullmatch(name))}
    if not ranks:
        return [(WEIGHTS, CONFIG)]
    if found & {WEIGHTS, CONFIG}:
        raise AdapterInvalid(
            f"{directory} holds a whole adapter and files of ranks: which one is meant? Move the "
            "other away"
        )
    return [(rank_file(WEIGHTS, r), rank_file(CONFIG, r)) for r in range(max(ranks) + 1)]


def _check_shapes(pair: Pair, decoder: DecoderSpec) -> None:
    """[rows, width] and [rows, 3 or 4], each perhaps behind one more dimension of 1."""
    for file in (pair.weights, pair.config):
        if len(file.shape) not in (2, 3) or (len(file.shape) == 3 and file.shape[0] != 1):
            raise AdapterInvalid(
                f"{file.path} has shape {list(file.shape)}, not [1, rows, columns]"
            )
    if pair.config.dtype != "int32" or pair.config.shape[-1] not in (3, 4):
        raise AdapterInvalid(
            f"{pair.config.path} is {pair.config.dtype} {list(pair.config.shape)}; a LoraConfig is "
            "int32 with 3 or 4 columns"
        )
    if pair.weights.shape[-2] != pair.rows:
        raise AdapterInvalid(
            f"{pair.weights.path} has {pair.weights.shape[-2]} rows, its config {pair.rows}"
        )
    most = len(MODULES) * decoder.layers
    if not 1 <= pair.rows <= most:
        raise AdapterInvalid(
            f"{pair.config.path} lists {pair.rows} modules; this base has 1 to {most}"
        )


def _entries(
    pairs: Sequence[Pair], decoder: DecoderSpec, gate_up: GateUpOrder | None
) -> list[Entry]:
    """Every line of the config, checked against the base and the files' width."""
    entries: list[Entry] = []
    seen: set[tuple[int, int]] = set()
    for index, line in enumerate(pairs[0].table().tolist()):
        where = _where(pairs[0], index)
        module, layer, rank, dora = _checked(line, where, decoder, gate_up)
        if (module.id, layer) in seen:
            raise AdapterInvalid(f"{where}: {module.name} of layer {layer} is listed twice")
        seen.add((module.id, layer))
        whole = shape_of(module, decoder, gate_up)
        local = whole if len(pairs) == 1 else local_shape(module, whole, len(pairs))
        entry = Entry(index, module, layer, rank, dora, whole, local)
        for pair in pairs:
            if entry.values > pair.width:
                raise AdapterInvalid(
                    f"{where}: {module.name} of rank {rank} needs {entry.values} values for this "
                    f"base, a row of {pair.weights.path.name} has {pair.width}"
                )
        entries.append(entry)
    return entries


def _checked(
    line: list[int], where: str, decoder: DecoderSpec, gate_up: GateUpOrder | None
) -> tuple[Module, int, int, bool]:
    """(module, layer, rank, DoRA) of a line [id, layer, rank] or [id, layer, rank, DoRA]."""
    id_, layer, rank = line[:3]
    module = BY_ID.get(id_)
    if module is None:
        raise AdapterInvalid(
            f"{where}: module id {id_} is none of TensorRT-LLM's 0 to {len(MODULES) - 1}"
        )
    if not module.parts:
        raise Unsupported(f"{where}: {module.name} (id {id_}) is {module.why}")
    if module is GATE_UP and gate_up is None:
        raise AdapterInvalid(
            f"{where}: {module.name} stores gate_proj and up_proj in an order that the file does "
            "not tell: give --gate-up-order up-gate (TensorRT-LLM's default) or gate-up (made with "
            "swap_gate_up_proj_lora_b_weight=False)"
        )
    if not 0 <= layer < decoder.layers:
        raise AdapterInvalid(f"{where}: layer {layer}; the base has {decoder.layers} layers")
    if not set(module.parts) <= set(decoder.projections(layer)):
        raise AdapterInvalid(f"{where}: the base's layer {layer} has no {module.name}")
    if not 1 <= rank <= MAX_RANK:
        raise AdapterInvalid(f"{where}: rank {rank} is outside 1 to {MAX_RANK}")
    dora = line[3] if len(line) == 4 else 0
    if dora not in (0, 1):
        raise AdapterInvalid(f"{where}: its DoRA flag is {dora}, neither 0 nor 1")
    return module, layer, rank, bool(dora)


def _rows(pairs: Sequence[Pair], entries: Sequence[Entry]) -> Iterator[tuple[Entry, Row]]:
    """Whole rows in float32."""
    with ExitStack() as stack:
        files = [stack.enter_context(pair.weights.path.open("rb")) for pair in pairs]
        for entry in entries:
            shares = [_row(pair, file, entry) for pair, file in zip(pairs, files, strict=True)]
            yield entry, shares[0] if len(shares) == 1 else join(shares, entry.whole)


def _row(pair: Pair, file: BinaryIO, entry: Entry) -> Row:
    where = f"{pair.weights.path}: row {entry.index} ({entry.module.name} of layer {entry.layer})"
    start = entry.index * pair.width
    values: NDArray[Any] = pair.weights.items(file, start, entry.values)
    numbers = values.astype(np.float32)
    check_finite(numbers, where)
    for first in range(entry.values, pair.width, _CHUNK_ITEMS):
        count = min(_CHUNK_ITEMS, pair.width - first)
        if np.any(pair.weights.items(file, start + first, count) != 0):
            raise AdapterInvalid(
                f"{where}: holds more than the {entry.values} values that rank {entry.rank} takes "
                "on this base; give the bundle of the adapter's own base with --base"
            )
    return row_from(numbers, entry.module, entry.layer, entry.rank, entry.local, dora=entry.dora)


def _where(pair: Pair, index: int) -> str:
    return f"{pair.config.path}: row {index}"
