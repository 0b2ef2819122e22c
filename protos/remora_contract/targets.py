"""Names of what an adapter changes and of the graph inputs that carry it. Names are data: every
string here has an inverse.

A decoder layer has seven adaptable projections, packed into four groups that share an input:

    qkv = q | k | v        o = o        gate_up = gate | up        down = down

For a group with input x [b, s, k] and packed output y [b, s, n] the portable graph computes
    y = x W + ((x A) * gate) B        A [k, T]   B [T, n]   gate [b, 1, T]
with A = lora_a, B = lora_b, gate = lora_gate below. T is the group's own dynamic dimension, the
same in every layer. B is block-diagonal over the group's parts in the packed order.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from remora_contract.errors import DocumentInvalid

Projection = Literal["q", "k", "v", "o", "gate", "up", "down"]
Group = Literal["qkv", "o", "gate_up", "down"]

PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
GROUPS: tuple[Group, ...] = get_args(Group)

PARTS: dict[Group, tuple[Projection, ...]] = {
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}
GROUP_OF: dict[Projection, Group] = {p: g for g, parts in PARTS.items() for p in parts}

_TARGET = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.([a-z]+)")


@dataclass(frozen=True, order=True)
class AdapterTarget:
    """One projection of one layer."""

    layer: int
    projection: Projection

    @property
    def group(self) -> Group:
        return GROUP_OF[self.projection]

    def name(self) -> str:
        """`layers.3.q`: the stem of the sidecar's tensor names."""
        return f"layers.{self.layer}.{self.projection}"

    def tensor_a(self) -> str:
        """Sidecar tensor A [k, r]."""
        return f"{self.name()}.a"

    def tensor_b(self) -> str:
        """Sidecar tensor B [r, n], the scale folded in."""
        return f"{self.name()}.b"

    @staticmethod
    def from_name(name: str) -> AdapterTarget:
        """Inverse of `name`. Raises DocumentInvalid."""
        match = _TARGET.fullmatch(name)
        if match is None or match[2] not in PROJECTIONS:
            raise DocumentInvalid(f"not an adapter target: {name[:80]!r}")
        return AdapterTarget(int(match[1]), match[2])


def lora_a(layer: int, group: Group) -> str:
    """Graph input A [k, T] of a packed group."""
    return f"lora_a.{layer}.{group}"


def lora_b(layer: int, group: Group) -> str:
    """Graph input B [T, n] of a packed group."""
    return f"lora_b.{layer}.{group}"


def lora_gate(group: Group) -> str:
    """Graph input gate [b, 1, T], shared by all layers."""
    return f"lora_gate.{group}"


def past_key(layer: int) -> str:
    """Graph input [b, kv_heads, context, head_dim]."""
    return f"past_key.{layer}"


def past_value(layer: int) -> str:
    return f"past_value.{layer}"


def present_key(layer: int) -> str:
    """Graph output of the same shape; may share the memory of `past_key`."""
    return f"present_key.{layer}"


def present_value(layer: int) -> str:
    return f"present_value.{layer}"


INPUT_IDS = "input_ids"  # [b, s] int64
POSITION_IDS = "position_ids"  # [b, s] int64, absolute; column 0 is where the cache is written
LAST_INDEX = "last_index"  # [b, 1] int64, which of the s positions gets logits
LOGITS = "logits"  # [b, vocab] float32
