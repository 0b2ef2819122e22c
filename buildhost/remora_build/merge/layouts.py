"""How the checkpoint stores a parameter that factors A and B add to. Pure.

Owns what the kind of a layer means for its weight: Linear [n, k], Conv1D and embeddings [k, n],
experts [e, n, k] (some [e, k, n]) or one tensor per expert. The kind decides, never the shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from remora_build.merge.changes import Experts
from remora_build.merge.places import STACKED_ORDER, Dialect, Places, Shape, Stack
from remora_build.merge.selection import last_part
from remora_contract.errors import CheckpointInvalid, Unsupported

# Layers that store their weight as [inputs, outputs]: model type -> last parts of module paths.
_CONV1D: Mapping[str, tuple[str, ...]] = {
    "gpt2": ("c_attn", "q_attn", "c_proj", "c_fc"),
    "openai-gpt": ("c_attn", "c_proj", "c_fc"),
}
# Experts stacked as [e, inputs, outputs].
_TRANSPOSED_EXPERTS = frozenset({"gpt_oss", "openai_privacy_filter", "aria", "aria_text"})
PARAMETERS = ("weight", *STACKED_ORDER)  # that can be adapted, in the order of registration


@dataclass(frozen=True)
class Base:
    """The checkpoint. `model_types`: of config.json and of its text_config."""

    places: Places
    model_types: frozenset[str]


@dataclass(frozen=True)
class Layout:
    """`count` experts (1: no experts) of `outputs` x `inputs`; each of `pieces` is a tensor and
    what of the experts it holds."""

    outputs: int
    inputs: int
    pieces: tuple[tuple[str, Experts | None], ...]
    count: int = 1
    transposed: bool = False


def weight_layout(base: Base, module: str, dialect: Dialect, *, embedding: bool) -> Layout | None:
    """Of a module's weight; None when the checkpoint does not store it as such."""
    tensor = base.places.tensor(module, "weight", dialect)
    if tensor is None:
        return None
    transposed = embedding or _is_conv1d(module, base.model_types)
    outputs, inputs = _matrix(base.places.shapes[tensor], tensor, transposed=transposed)
    return Layout(outputs, inputs, ((tensor, None),), transposed=transposed)


def parameter_layout(base: Base, module: str, parameter: str, dialect: Dialect) -> Layout | None:
    """Of any parameter, experts included."""
    stack = base.places.stack(module, parameter, dialect)
    if stack is not None:
        return _stack_layout(stack, base.places)
    tensor = base.places.tensor(module, parameter, dialect)
    if tensor is None:
        return None
    shape = base.places.shapes[tensor]
    if len(shape) != 3:
        outputs, inputs = _matrix(shape, tensor, transposed=False)
        return Layout(outputs, inputs, ((tensor, None),))
    transposed = bool(_TRANSPOSED_EXPERTS & base.model_types)
    outputs, inputs = shape[:0:-1] if transposed else shape[1:]
    experts = Experts(shape[0], None, (0, outputs))
    return Layout(outputs, inputs, ((tensor, experts),), shape[0], transposed)


def _stack_layout(stack: Stack, places: Places) -> Layout:
    """Raises CheckpointInvalid when the experts' shapes do not fit together."""
    shapes = [_matrix(places.shapes[t], t, transposed=False) for t in stack.tensors[0]]
    inputs = shapes[0][1]
    pieces: list[tuple[str, Experts]] = []
    for index, tensors in enumerate(stack.tensors):
        first = 0
        for tensor, shape in zip(tensors, shapes, strict=True):
            if places.shapes[tensor] != (shape[0], inputs):
                raise CheckpointInvalid(f"{tensor} is shaped otherwise than {stack.tensors[0][0]}")
            rows = first, first + shape[0]
            pieces.append((tensor, Experts(len(stack.tensors), index, rows)))
            first = rows[1]
    return Layout(sum(n for n, _ in shapes), inputs, tuple(pieces), len(stack.tensors))


def _is_conv1d(module: str, model_types: frozenset[str]) -> bool:
    return any(last_part(module) in _CONV1D.get(t, ()) for t in model_types)


def _matrix(shape: Shape, tensor: str, *, transposed: bool) -> tuple[int, int]:
    """(outputs, inputs). Raises Unsupported for what is no matrix."""
    if len(shape) != 2:
        raise Unsupported(f"{tensor} is {list(shape)}, no matrix: only LoRA of matrices is merged")
    return (shape[1], shape[0]) if transposed else (shape[0], shape[1])
