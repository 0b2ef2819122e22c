"""Names of what an adapter changes and of the graph inputs that carry it. Names are data: every
string here has an inverse.

A decoder layer's adaptable projections are packed into groups that share an input:

    qkv = q | k | v        o = o        gate_up = gate | up        down = down

For a group with input x [b, s, k] and packed output y [b, s, n] the portable graph computes
    y = x W + ((x A) * gate) B        A [k, T]   B [T, n]   gate [b, 1, T]
with A = lora_a, B = lora_b, gate = lora_gate below. T is the group's own dynamic dimension, the
same in every layer. B is block-diagonal over the group's parts in the packed order. Where the graph
was built for them, DoRA's factors and an adapter's biases stand around that:
    y = scale * (x W + ((x A) * gate) B) + base bias + bias      scale, bias [b, 1, n]

A layer of experts has expert_gate_up and expert_down, whose A [E, k, T] and B [E, T, n] hold one
factor for each expert, and, where there is one, the shared expert's groups. Outside the layers
stand `embed` (A [vocab, T] is looked up by token) and `head`, both before the decoder's own
scaling of the embedding and of the logits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from remora_contract.errors import DocumentInvalid

Projection = Literal[
    "q", "k", "v", "o", "gate", "up", "down",
    "shared_gate", "shared_up", "shared_down",
    "expert_gate", "expert_up", "expert_down",
    "embed", "head",
]  # fmt: skip
Group = Literal[
    "qkv", "o", "gate_up", "down",
    "shared_gate_up", "shared_down",
    "expert_gate_up", "expert_down",
    "embed", "head",
]  # fmt: skip

ALL_PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
ALL_GROUPS: tuple[Group, ...] = get_args(Group)
# Of a dense decoder layer.
PROJECTIONS: tuple[Projection, ...] = ALL_PROJECTIONS[:7]
GROUPS: tuple[Group, ...] = ALL_GROUPS[:4]
DENSE_GROUPS = GROUPS
ATTENTION_GROUPS: tuple[Group, ...] = ("qkv", "o")
SHARED_GROUPS: tuple[Group, ...] = ("shared_gate_up", "shared_down")
EXPERT_GROUPS: tuple[Group, ...] = ("expert_gate_up", "expert_down")
MODEL_GROUPS: tuple[Literal["embed", "head"], ...] = ("embed", "head")  # outside the layers
DOWN: tuple[Projection, ...] = ("down", "shared_down", "expert_down")

PARTS: dict[Group, tuple[Projection, ...]] = {
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
    "shared_gate_up": ("shared_gate", "shared_up"),
    "shared_down": ("shared_down",),
    "expert_gate_up": ("expert_gate", "expert_up"),
    "expert_down": ("expert_down",),
    "embed": ("embed",),
    "head": ("head",),
}
GROUP_OF: dict[Projection, Group] = {p: g for g, parts in PARTS.items() for p in parts}

_TARGET = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.([a-z_]+)")


@dataclass(frozen=True, order=True)
class AdapterTarget:
    """One projection of one layer; of `embed` and `head`, which stand outside, the layer is 0."""

    layer: int
    projection: Projection

    def __post_init__(self) -> None:
        if self.projection in MODEL_GROUPS and self.layer:
            raise ValueError(f"{self.projection} belongs to no layer")

    @property
    def group(self) -> Group:
        return GROUP_OF[self.projection]

    def name(self) -> str:
        """`layers.3.q`, `head`: the stem of the sidecar's tensor names."""
        if self.projection in MODEL_GROUPS:
            return self.projection
        return f"layers.{self.layer}.{self.projection}"

    def tensor_a(self) -> str:
        """Sidecar tensor A [k, r]."""
        return f"{self.name()}.a"

    def tensor_b(self) -> str:
        """Sidecar tensor B [r, n], the scale folded in."""
        return f"{self.name()}.b"

    def tensor_scale(self) -> str:
        """Sidecar tensor [n] of a DoRA target: what its outputs are multiplied by."""
        return f"{self.name()}.m"

    def tensor_bias(self) -> str:
        """Sidecar tensor [n]: what is added to the target's outputs."""
        return f"{self.name()}.bias"

    @staticmethod
    def from_name(name: str) -> AdapterTarget:
        """Inverse of `name`. Raises DocumentInvalid."""
        if name in MODEL_GROUPS:
            return AdapterTarget(0, name)
        match = _TARGET.fullmatch(name)
        if match is None or match[2] not in ALL_PROJECTIONS or match[2] in MODEL_GROUPS:
            raise DocumentInvalid(f"not an adapter target: {name[:80]!r}")
        return AdapterTarget(int(match[1]), match[2])


def matrix_name(layer: int, group: Group) -> str:
    """`layers.3.qkv`, `head`: a weight matrix, as the graph and bundle.json call it."""
    return group if group in MODEL_GROUPS else f"layers.{layer}.{group}"


def is_matrix(name: str) -> bool:
    """Whether some decoder may have a matrix of this name; the embedding's table is none."""
    found = _TARGET.fullmatch(name)
    if found is None:
        return name == "head"
    return found[2] in ALL_GROUPS and found[2] not in MODEL_GROUPS


def lora_a(layer: int, group: Group) -> str:
    """Graph input A [k, T] of a packed group (experts: [E, k, T])."""
    return _of_group("lora_a", layer, group)


def lora_b(layer: int, group: Group) -> str:
    """Graph input B [T, n] of a packed group (experts: [E, T, n])."""
    return _of_group("lora_b", layer, group)


def lora_scale(layer: int, group: Group) -> str:
    """Graph input [b, 1, n] of a graph with DoRA: y is multiplied by it, 1 for plain rows."""
    return _of_group("lora_scale", layer, group)


def lora_bias(layer: int, group: Group) -> str:
    """Graph input [b, 1, n] of a graph with adapter biases: added to y, 0 for plain rows."""
    return _of_group("lora_bias", layer, group)


def _of_group(stem: str, layer: int, group: Group) -> str:
    return f"{stem}.{group}" if group in MODEL_GROUPS else f"{stem}.{layer}.{group}"


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
# [b, 1] int64, tokens of the whole sequence that a row's are a part of; only of a longrope that a
# sequence may outgrow (DecoderSpec.switches)
SEQUENCE_LENGTH = "sequence_length"
LOGITS = "logits"  # [b, vocab] float32
