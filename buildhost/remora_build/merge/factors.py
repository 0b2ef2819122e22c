"""A module's LoRA factors -> changes of the tensors that hold its weight and bias.

Owns which parts must be there and the shapes that A [r·e, k] and B [n, r·e] must have. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from remora_build.adapters.matching import rank_and_alpha, selects_parameter
from remora_build.merge.changes import Change, LowRank, Magnitude, Shift
from remora_build.merge.layouts import (
    PARAMETERS,
    Base,
    Layout,
    parameter_layout,
    weight_layout,
)
from remora_build.merge.names import Factors, Part
from remora_build.merge.places import Dialect, Shape
from remora_build.merge.selection import HEADS, last_part, selects_module
from remora_build.merge.settings import MergeSettings
from remora_contract.errors import AdapterInvalid, Unsupported

MAX_FACTOR_BYTES = 1 << 30  # of one A or B in float32: they are read whole


@dataclass(frozen=True)
class Source:
    """One adapter. `weight` multiplies its scalings; `shapes` are those of its tensors."""

    index: int
    weight: float
    settings: MergeSettings
    shapes: Mapping[str, Shape]


@dataclass(frozen=True)
class Bound:
    """`path`: the parameter in the model; `tensor`: where the checkpoint holds it."""

    path: str
    tensor: str
    change: Change


def bind_factors(factors: Factors, source: Source, base: Base, dialect: Dialect) -> Iterator[Bound]:
    """Raises AdapterInvalid for factors that do not fit, Unsupported for a bias without place."""
    embedding = "embedding_A" in factors.parts or "embedding_B" in factors.parts
    if factors.nesting == 0 and _selected(factors.module, source.settings):
        layout = weight_layout(base, factors.module, dialect, embedding=embedding)
        if layout is not None:
            yield from _bind_module(factors, layout, source, embedding=embedding)
            yield from _bind_bias(factors, layout, source, base, dialect)
            return
    yield from _bind_parameter(factors, source, base, dialect)


def _selected(module: str, settings: MergeSettings) -> bool:
    """With ensure_weight_tying PEFT takes the head's factors from the embedding's."""
    follows = settings.lora.weight_tying and last_part(module) in HEADS
    return follows or selects_module(settings, module)


def _bind_module(
    factors: Factors, layout: Layout, source: Source, *, embedding: bool
) -> Iterator[Bound]:
    names: tuple[Part, Part] = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    optional: tuple[Part, ...] = ("magnitude",) if embedding else ("magnitude", "bias")
    a, b = _pair(factors, names, optional)
    product = _product(a, b, factors.module, layout, source)
    magnitude = _magnitude(factors, layout, source)
    (tensor, _), *_ = layout.pieces
    change = Change(products=(product,), magnitude=magnitude)
    yield Bound(f"{factors.module}.weight", tensor, change)


def _magnitude(factors: Factors, layout: Layout, source: Source) -> Magnitude | None:
    tensor = factors.parts.get("magnitude")
    if (tensor is not None) != source.settings.lora.use_dora:
        said = "says" if source.settings.lora.use_dora else "does not say"
        has = tensor if tensor is not None else f"{factors.module} has no lora_magnitude_vector"
        raise AdapterInvalid(f"{source.settings.where} {said} use_dora: {has}")
    if tensor is None:
        return None
    _check_shape(source, tensor, (layout.outputs,))
    return Magnitude(source.index, tensor, "column" if layout.transposed else "row")


def _bind_bias(
    factors: Factors, layout: Layout, source: Source, base: Base, dialect: Dialect
) -> Iterator[Bound]:
    """lora_bias: a bias on B, which PEFT adds to the layer's own, scaled like the product."""
    module, tensor = factors.module, factors.parts.get("bias")
    if (tensor is not None) != source.settings.lora.lora_bias:
        raise AdapterInvalid(
            f"{source.settings.where}: lora_bias is {source.settings.lora.lora_bias}, but {module} "
            f"has {'no ' if tensor is None else ''}lora_B.bias"
        )
    if tensor is None:
        return
    place = base.places.tensor(module, "bias", dialect)
    if place is None:
        raise Unsupported(
            f"lora_bias: {module} of the checkpoint has no bias that {tensor} could be added to; "
            "PEFT cannot merge it either"
        )
    _check_shape(source, tensor, (layout.outputs,))
    _, scale = _rank_and_scale(module, source)
    shift = Shift(source.index, tensor, scale)
    yield Bound(f"{module}.lora_B.bias", place, Change(shifts=(shift,)))


def _bind_parameter(
    factors: Factors, source: Source, base: Base, dialect: Dialect
) -> Iterator[Bound]:
    """target_parameters: PEFT nests one wrapper per parameter of a module, the first inmost."""
    module = factors.module
    found = ((p, parameter_layout(base, module, p, dialect)) for p in PARAMETERS)
    chosen = [
        (f"{module}.{p}", layout)
        for p, layout in found
        if layout is not None and selects_parameter(source.settings.lora, f"{module}.{p}")
    ]
    if factors.nesting >= len(chosen):
        raise AdapterInvalid(
            f"tensor {_any_of(factors)}: neither target_modules nor target_parameters of "
            f"{source.settings.where} selects {module}; PEFT would ignore it"
        )
    path, layout = chosen[len(chosen) - 1 - factors.nesting]
    a, b = _pair(factors, ("A", "B"), ())
    product = _product(a, b, path, layout, source)
    for tensor, experts in layout.pieces:
        piece = LowRank(
            product.adapter, a, b, product.rank, product.scale, layout.transposed, experts
        )
        yield Bound(path, tensor, Change(products=(piece,)))


def _product(a: str, b: str, path: str, layout: Layout, source: Source) -> LowRank:
    rank, scale = _rank_and_scale(path, source)
    width = rank * layout.count
    for tensor, axis, side in ((a, 0, layout.inputs), (b, 1, layout.outputs)):
        _check_rank(source, tensor, axis, width)
        _check_shape(source, tensor, (width, side) if axis == 0 else (side, width))
        if 4 * width * side > MAX_FACTOR_BYTES:
            raise AdapterInvalid(
                f"{tensor} takes {4 * width * side} bytes in float32, more than {MAX_FACTOR_BYTES}:"
                f" rank {rank} is absurd"
            )
    return LowRank(source.index, a, b, rank, scale, layout.transposed)


def _rank_and_scale(path: str, source: Source) -> tuple[int, float]:
    lora = source.settings.lora
    rank, alpha = rank_and_alpha(lora, path)
    return rank, source.weight * lora.scaling(rank, alpha)


def _pair(
    factors: Factors, names: tuple[Part, Part], optional: tuple[Part, ...]
) -> tuple[str, str]:
    """The tensors of A and B. Raises AdapterInvalid when one is missing or others are there."""
    for part in names:
        if part not in factors.parts:
            raise AdapterInvalid(
                f"{factors.module} has {_any_of(factors)}, but no lora_{part}: the adapter is "
                "incomplete; save it again"
            )
    for part, tensor in factors.parts.items():
        if part not in (*names, *optional):
            raise AdapterInvalid(f"tensor {tensor} has no meaning beside {factors.parts[names[0]]}")
    return factors.parts[names[0]], factors.parts[names[1]]


def _any_of(factors: Factors) -> str:
    return next(iter(factors.parts.values()))


def _check_rank(source: Source, tensor: str, axis: int, width: int) -> None:
    shape = source.shapes[tensor]
    if len(shape) == 2 and shape[axis] != width:
        raise AdapterInvalid(
            f"{tensor} is {list(shape)}: its rank is {shape[axis]}, the config says {width} "
            "(r, rank_pattern; times the experts)"
        )


def _check_shape(source: Source, tensor: str, need: Shape) -> None:
    if source.shapes[tensor] != need:
        name = source.settings.lora.base_name
        said = f" (its config says {name!r})" if name else ""
        raise AdapterInvalid(
            f"{tensor} is {list(source.shapes[tensor])}, this checkpoint needs {list(need)}: the "
            f"adapter was trained on another base{said}"
        )
