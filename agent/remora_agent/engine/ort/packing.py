"""One mix as arrays an engine can bind: adapters' factors side by side, in float32.

For each layer and group:
    a    [1, k, parts * r]       the group's A factors side by side, each r wide
    b_p  [1, r, n_p]             for each part p; the mix's weights are folded in here
r is the widest part's rank in that layer; narrower ones are padded with zeros. A mix of several
adapters is their columns side by side: x [A1 A2] [w1 B1; w2 B2] = w1 x A1 B1 + w2 x A2 B2.

All A factors of a mix stand in one block of memory and all B factors in another: the system gives
such blocks in huge pages, where thousands of small ones cost as much as the conversion itself.
Knows no residents and no graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora_agent.bank.weights import AdapterWeights
from remora_agent.engine.ort import names
from remora_agent.engine.ort.extras import Extras
from remora_agent.engine.ort.values import Buffer
from remora_contract.decoder import DecoderSpec
from remora_contract.targets import PARTS, AdapterTarget, Group, Projection

Packed = Mapping[str, Buffer]  # input name -> array with a leading axis of 1
Entries = Sequence[tuple[AdapterWeights, float]]

_LINE = 16  # float32 in a cache line of 64 bytes
_HALF_TO_SINGLE = np.float32(2.0**112)  # between the biases of their exponents, 15 and 127
_SIGN_AND_REST = np.int32(-0x70000001)  # all bits but 28 to 30


@dataclass(frozen=True)
class _Parts:
    """What one group of a layer is packed of."""

    layer: int
    group: Group
    k: int
    rank: int
    widths: Mapping[Projection, int]
    factors: Mapping[Projection, Sequence[tuple[NDArray[Any], NDArray[Any], float]]]

    @property
    def shape_a(self) -> tuple[int, int, int]:
        return 1, self.k, len(self.widths) * self.rank


def pack(
    decoder: DecoderSpec,
    entries: Entries,
    twin: Packed | None = None,
    extras: Extras | None = None,
) -> Packed:
    """One mix as bound arrays. Without entries it adds zeros. The A factors of `twin`, the same
    adapters packed with other weights, are shared and not copied."""
    groups = [_parts(decoder, *place, entries) for place in (extras or Extras()).groups(decoder)]
    names_a = [names.slot_a(g.layer, g.group) for g in groups]
    if twin is None:
        arrays_a = dict(zip(names_a, _blocks(g.shape_a for g in groups), strict=True))
        for group, array in zip(groups, arrays_a.values(), strict=True):
            _fill_a(array[0], group)
    else:
        arrays_a = {name: twin[name].array for name in names_a}
    arrays_b = dict(zip(_names_b(groups), _blocks(_shapes_b(groups)), strict=True))
    for group in groups:
        for part, factors in group.factors.items():
            _fill_b(arrays_b[names.slot_b(group.layer, part)][0], factors)
    return {name: Buffer(array) for name, array in (arrays_a | arrays_b).items()}


def packed_views(
    weights: AdapterWeights, packed: Packed
) -> dict[AdapterTarget, tuple[NDArray[np.floating], NDArray[np.floating]]]:
    """The adapter's factors where `packed`, made of it alone, holds them in float32; what it does
    not hold stays as it is."""
    views = dict(weights.tensors)
    for target, (a, _) in weights.tensors.items():
        name_a = names.slot_a(target.layer, target.group)
        name_b = names.slot_b(target.layer, target.projection)
        if name_a in packed and name_b in packed:
            slot_a, slot_b = packed[name_a].array[0], packed[name_b].array[0]
            at = PARTS[target.group].index(target.projection) * slot_b.shape[0]
            width = a.shape[-1]
            views[target] = (slot_a[:, at : at + width], slot_b[:width])
    return views


def _parts(decoder: DecoderSpec, layer: int, group: Group, entries: Entries) -> _Parts:
    factors = {
        p: [
            (*w.tensors[t], weight)
            for w, weight in entries
            if (t := AdapterTarget(layer, p)) in w.tensors
        ]
        for p in PARTS[group]
    }
    # ONNX Runtime 1.23 cannot split an empty axis: an unused group is one column of zeros.
    rank = max(1, *(sum(a.shape[1] for a, _, _ in found) for found in factors.values()))
    k = decoder.in_features(PARTS[group][0])
    widths = {p: decoder.out_features(p) for p in PARTS[group]}
    return _Parts(layer, group, k, rank, widths, factors)


def _names_b(groups: Iterable[_Parts]) -> list[str]:
    return [names.slot_b(g.layer, part) for g in groups for part in g.widths]


def _shapes_b(groups: Iterable[_Parts]) -> list[tuple[int, int, int]]:
    return [(1, g.rank, n) for g in groups for n in g.widths.values()]


def _blocks(shapes: Iterable[tuple[int, ...]]) -> Iterator[NDArray[np.float32]]:
    """Arrays of these shapes, each on its own cache lines, in one block of memory; not filled."""
    wanted = list(shapes)
    lines = [-(-prod(shape) // _LINE) for shape in wanted]
    memory = np.empty((sum(lines) + 1) * _LINE, np.float32)
    at = -(memory.ctypes.data // memory.itemsize) % _LINE
    for shape, taken in zip(wanted, lines, strict=True):
        yield memory[at : at + prod(shape)].reshape(shape)
        at += taken * _LINE


def _fill_a(slot: NDArray[np.float32], group: _Parts) -> None:
    """[k, parts * rank]: for each part its adapters' A factors, then zeros up to `rank`."""
    for i, factors in enumerate(group.factors.values()):
        at = i * group.rank
        for a, _, _ in factors:
            _convert(a, slot[:, at : at + a.shape[1]])
            at += a.shape[1]
        slot[:, at : (i + 1) * group.rank] = 0


def _fill_b(
    slot: NDArray[np.float32], factors: Sequence[tuple[NDArray[Any], NDArray[Any], float]]
) -> None:
    """[rank, n]: the adapters' B factors times their weights, then zeros."""
    at = 0
    for _, b, weight in factors:
        rows = slot[at : at + b.shape[0]]
        _convert(b, rows)
        if weight != 1.0:
            rows *= np.float32(weight)
        at += b.shape[0]
    slot[at:] = 0


def _convert(source: NDArray[np.floating], out: NDArray[np.float32]) -> None:
    """`out[...] = source`. Finite float16 by its bits, some thousand numbers at a time: numpy
    converts them one by one on x86, in three times the time."""
    if source.dtype != np.float16:
        out[...] = source
        return
    whole = out if out.flags.c_contiguous else np.empty(out.shape, np.float32)
    bits = whole.view(np.int32)
    np.left_shift(source.view(np.int16), 13, out=bits, dtype=np.int32)
    np.bitwise_and(bits, _SIGN_AND_REST, out=bits)
    np.multiply(whole, _HALF_TO_SINGLE, out=whole)
    if whole is not out:
        out[...] = whole
