"""Names of the built graph's inputs that the portable graph does not have.

Hidden states are [g, m, k]: g equal groups of m tokens, each group with one adapter mix. Attention
sees the same tokens as [b, s, ...]. g * m = b * s, rows outermost in both.
"""

from __future__ import annotations

from remora_contract.targets import Group, Projection

BACKEND = "onnxruntime"
MODEL = "model.onnx"  # the built graph with everything

BATCH_SHAPE = "batch_shape"  # int64 [3]: b, s, -1
GROUP_SHAPE = "group_shape"  # int64 [3]: g, m, -1
LAST_POSITION = "last_position"  # int32 [b]: position of each row's last token
TOTAL_LENGTH = "total_length"  # int32 scalar: the longest row's length after this step
STATE_INDEX = "state_index"  # int64 [n]: of the b * s tokens, those whose states are normed
LOGITS_INDEX = "logits_index"  # int64 [k]: of those n, the ones that get logits

# An output beside the portable graph's: float32 [n, hidden], the states after the final norm.
STATES = "states"


_ADAPTED = ".with_adapter"


def slot_a(layer: int, group: Group) -> str:
    """Input A [g, k, parts * r] of a packed group."""
    return f"slot_a.{layer}.{group}"


def slot_b(layer: int, projection: Projection) -> str:
    """Input B [g, r, n] of one projection."""
    return f"slot_b.{layer}.{projection}"


def slot_scale(layer: int, group: Group) -> str:
    """Input [g, 1, n] of a packed group: DoRA's factors."""
    return f"slot_scale.{layer}.{group}"


def slot_bias(layer: int, group: Group) -> str:
    """Input [g, 1, n] of a packed group: adapters' biases."""
    return f"slot_bias.{layer}.{group}"


def expert_a(layer: int, group: Group) -> str:
    """Input A [experts, k, T] of a packed group of experts: all mixes of a step side by side."""
    return f"slot_a.{layer}.{group}"


def expert_b(layer: int, group: Group) -> str:
    """Input B [experts, T, n] of a packed group of experts, weights folded in."""
    return f"slot_b.{layer}.{group}"


def expert_adapted(layer: int, group: Group) -> str:
    """The Add node of a branch inside the experts' loop."""
    return f"layers.{layer}.{group}.adapted"


def expert_gate(group: Group) -> str:
    """Input [b, 1, T], shared by all layers: 1 where a column is of the row's mix, else 0."""
    return f"slot_gate.{group}"


SLOT_EMBED = "slot_embed"  # float32 [g, m, hidden]: what adapters add to the looked up rows


def adapted(layer: int, projection: Projection) -> str:
    """The Add node that brings the adapter's part into a projection, or into its packed group."""
    return f"layers.{layer}.{projection}{_ADAPTED}"


def rescaled(layer: int, group: Group) -> str:
    """The Mul node of a group's `slot_scale`."""
    return f"layers.{layer}.{group}.rescaled{_ADAPTED}"


def rebiased(layer: int, group: Group) -> str:
    """The Add node of a group's `slot_bias`."""
    return f"layers.{layer}.{group}.rebiased{_ADAPTED}"


def is_adapted(node_name: str | None) -> bool:
    """Is it such a node? It adds an adapter's part, not a block's to the residual stream."""
    return (node_name or "").endswith(_ADAPTED)
