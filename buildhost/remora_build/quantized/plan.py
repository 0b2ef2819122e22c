"""What a quantized checkpoint means for the graph: the form of every matrix, and the vectors that
go with its input. Parts packed into one matrix must be stored alike and share an input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from remora_build.checkpoint.safetensors_file import TensorEntry
from remora_build.checkpoint.stream import TensorStream
from remora_build.families.naming import Naming, Source
from remora_build.graph.forms import PLAIN, Forms, MatrixForm
from remora_build.quantized.section import Scheme
from remora_build.quantized.stored import StoredMatrix, entries_of, find_stored
from remora_contract.bundle import QuantSpec
from remora_contract.errors import Unsupported
from remora_contract.targets import matrix_name

Stored = Mapping[str, StoredMatrix]
T = TypeVar("T")


@dataclass(frozen=True)
class Vectors:
    """What goes with a matrix's input and its adapter branch; None: nothing."""

    prescale: NDArray[np.float32] | None = None  # [k]
    input_scale: float | None = None
    branch_in: NDArray[np.float32] | None = None  # [k]
    branch_out: NDArray[np.float32] | None = None  # [n]


@dataclass(frozen=True)
class QuantizedPlan:
    """`stored` by the name of the tensor that an unquantized checkpoint would have instead;
    `vectors` by matrix ("layers.0.qkv"); `left_out`: scales of a quantized cache."""

    scheme: Scheme
    stored: Stored
    quant: QuantSpec
    forms: Forms
    vectors: Mapping[str, Vectors] = field(default_factory=dict)
    left_out: Mapping[str, TensorEntry] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        """Everything in the checkpoint that an unquantized one would not have."""
        return entries_of(self.stored.values()) | dict(self.left_out)


def plan_quantized(
    naming: Naming, scheme: Scheme, entries: Mapping[str, TensorEntry]
) -> QuantizedPlan:
    """Reads only the small tensors. Raises CheckpointInvalid, Unsupported by the matrix's name."""
    if naming.spec.experts is not None:
        raise Unsupported(
            "a quantized mixture of experts is not read yet; export the original checkpoint"
        )
    tensors = naming.tensors()
    modules = {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in tensors.items()
        if len(shape) == 2 and name.endswith(".weight") and name != naming.embedding
    }
    found = find_stored(scheme.layout, modules, entries)
    stored = {f"{module}.weight": matrix for module, matrix in found.items()}
    forms: dict[str, MatrixForm] = _plain_head(naming)
    vectors: dict[str, Vectors] = {}
    with TensorStream() as stream:
        for matrix, sources in matrices(naming):
            parts = [stored.get(source.tensor) for source in sources]
            forms[matrix], vectors[matrix] = _form(matrix, parts, stream)
    left_out = _cache_scales(naming, scheme, entries)
    return QuantizedPlan(scheme, stored, _spec(scheme, forms), Forms(own=forms), vectors, left_out)


def _cache_scales(
    naming: Naming, scheme: Scheme, entries: Mapping[str, TensorEntry]
) -> dict[str, TensorEntry]:
    """Beside the attention's projections, or in the attention itself."""
    found = {}
    for layer in range(naming.spec.layers):
        for projection in naming.spec.projections(layer):
            module = naming.weight(layer, projection).tensor.removesuffix(".weight")
            for parent in (module, module.rpartition(".")[0]):
                for suffix in scheme.cache_scales:
                    entry = entries.get(f"{parent}.{suffix}")
                    if entry is not None:
                        found[entry.name] = entry
    return found


def matrices(naming: Naming) -> Iterator[tuple[str, tuple[Source, ...]]]:
    """Every matrix of a decoder without experts, with what it is made of."""
    spec = naming.spec
    for layer in range(spec.layers):
        for group in spec.groups(layer):
            yield matrix_name(layer, group), naming.weights(layer, group)
    if not spec.tied_embeddings:
        yield "head", (Source(naming.head, 0, spec.vocab),)


def _plain_head(naming: Naming) -> dict[str, MatrixForm]:
    """A tied head is the embedding, which no tool quantizes."""
    return {"head": PLAIN} if naming.spec.tied_embeddings else {}


def _form(
    matrix: str, parts: Sequence[StoredMatrix | None], stream: TensorStream
) -> tuple[MatrixForm, Vectors]:
    present = [p for p in parts if p is not None]
    if not present:
        return PLAIN, Vectors()
    if len(present) != len(parts):
        raise Unsupported(
            f"{matrix}: only {', '.join(p.module for p in present)} of its parts is quantized; "
            "quantize all parts that share an input, or none"
        )
    prescale = _shared(matrix, "pre_quant_scale", present, lambda p: p.prescale(stream))
    rounded = _shared(matrix, "input_scale", present, lambda p: p.input_scale(stream))
    whole = {p.global_scale(stream) for p in present}
    scheme = present[0].layout
    form = MatrixForm(
        scheme.kind,
        scheme.block,
        offsets=scheme.offsets,
        global_columns=len(whole) > 1,
        prescaled=prescale is not None,
        activations=scheme.activations if rounded is not None else "none",
    )
    return form, Vectors(prescale, rounded)


def _shared(
    matrix: str, what: str, parts: Sequence[StoredMatrix], value: Callable[[StoredMatrix], T | None]
) -> T | None:
    """The value that all parts have. Raises Unsupported when they differ."""
    values = [value(p) for p in parts]
    for part, other in zip(parts[1:], values[1:], strict=True):
        if not _same(values[0], other):
            raise Unsupported(
                f"{matrix}: {parts[0].module} and {part.module} differ in {what}, though they read "
                "the same input; quantize them together"
            )
    return values[0]


def _same(a: Any, b: Any) -> bool:
    return bool((a is None) == (b is None)) and bool(np.array_equal(a, b))


def _spec(scheme: Scheme, forms: Mapping[str, MatrixForm]) -> QuantSpec:
    rounded = [f.activations for f in forms.values() if f.activations != "none"]
    return QuantSpec(
        scheme.layout.kind if scheme.layout.kind != "plain" else "none",
        scheme.layout.block,
        zero_points=scheme.layout.offsets,
        prescaled=any(f.prescaled for f in forms.values()),
        activations=rounded[0] if rounded else "none",
        plain=tuple(sorted(name for name, form in forms.items() if form.kind == "plain")),
    )
