"""Row slots: for a batch whose rows use different mixes, each row's arrays lie in its own slot.

    a    [rows, k, parts * r]     b_p  [rows, r, n_p]     scale, bias  [rows, 1, n]

r of a layer and group is what the widest of the current mixes needs. Slots are refilled only when a
row's mix changes; they widen when they must and shrink when twice too wide.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from remora_agent.engine.ort import names
from remora_agent.engine.ort.extras import Extras
from remora_agent.engine.ort.packing import Packed
from remora_agent.engine.ort.values import Buffer
from remora_contract.decoder import DecoderSpec
from remora_contract.targets import PARTS, Group


class RowSlots:
    """Owns the slot arrays of all layers and groups."""

    def __init__(self, decoder: DecoderSpec, rows: int, extras: Extras | None = None) -> None:
        extras = extras or Extras()
        self._rows = rows
        self._groups: list[_GroupSlots | _VectorSlots] = [
            *(_GroupSlots(decoder, layer, group, rows) for layer, group in extras.groups(decoder)),
            *(
                _VectorSlots(decoder, name, group, rows)
                for name, _, _, group in extras.vectors(decoder)
            ),
        ]
        self._held: list[Packed | None] = [None] * rows
        self.generation = 0  # counts reallocations: bindings of older arrays are stale

    def fill(self, wanted: Sequence[tuple[int, Packed]]) -> None:
        """Makes each given row's slot hold its mix; other rows' slots are not read this step."""
        changed = [(row, mix) for row, mix in wanted if self._held[row] is not mix]
        if not changed:
            return
        current = [mix for _, mix in wanted]
        reallocated = False
        for slots in self._groups:
            if slots.fit(current):
                reallocated = True
                for row, mix in wanted:
                    slots.fill(row, mix)
            else:
                for row, mix in changed:
                    slots.fill(row, mix)
        if reallocated:
            self.generation += 1
            self._held = [None] * self._rows
        for row, mix in wanted:
            self._held[row] = mix

    def forget(self, mix: Packed) -> None:
        """Drops the claim to hold a mix that no longer exists."""
        self._held = [None if held is mix else held for held in self._held]

    def view(self, first: int, count: int) -> dict[str, Buffer]:
        """Input name -> slots of rows first..first+count-1, the same memory."""
        found: dict[str, Buffer] = {}
        for slots in self._groups:
            found |= {n: Buffer(a[first : first + count]) for n, a in slots.arrays.items()}
        return found


class _VectorSlots:
    """The slots of one vector of a packed group; their size never changes."""

    def __init__(self, decoder: DecoderSpec, name: str, group: Group, rows: int) -> None:
        self._name = name
        width = sum(decoder.out_features(p) for p in PARTS[group])
        self.arrays = {name: np.zeros((rows, 1, width), np.float32)}

    def fit(self, mixes: Sequence[Packed]) -> bool:
        return False

    def fill(self, row: int, mix: Packed) -> None:
        self.arrays[self._name][row] = mix[self._name].array[0]


class _GroupSlots:
    """The slots of one layer and group."""

    def __init__(self, decoder: DecoderSpec, layer: int, group: Group, rows: int) -> None:
        self._a = names.slot_a(layer, group)
        self._parts = {names.slot_b(layer, p): decoder.out_features(p) for p in PARTS[group]}
        self._k = decoder.in_features(PARTS[group][0])
        self._rows = rows
        self._rank = 0
        self.arrays: dict[str, NDArray[np.float32]] = {}
        self._allocate(0)

    def fit(self, mixes: Sequence[Packed]) -> bool:
        """Reallocates when the widest mix needs it; were the old contents lost?"""
        first = next(iter(self._parts))
        need = max(mix[first].array.shape[1] for mix in mixes)
        if need == self._rank or self._rank // 2 < need < self._rank:
            return False
        self._allocate(need)
        return True

    def fill(self, row: int, mix: Packed) -> None:
        """Copies a mix into a row's slot, padding it with zeros to the slots' rank."""
        width = len(self._parts)
        a = mix[self._a].array[0]
        rank = a.shape[1] // width
        slot = self.arrays[self._a][row].reshape(self._k, width, self._rank)
        slot[:, :, :rank] = a.reshape(self._k, width, rank)
        slot[:, :, rank:] = 0
        for name in self._parts:
            b_slot = self.arrays[name][row]
            b_slot[:rank] = mix[name].array[0]
            b_slot[rank:] = 0

    def _allocate(self, rank: int) -> None:
        self._rank = rank
        width = len(self._parts)
        self.arrays = {self._a: np.zeros((self._rows, self._k, width * rank), np.float32)}
        for name, n in self._parts.items():
            self.arrays[name] = np.zeros((self._rows, rank, n), np.float32)
