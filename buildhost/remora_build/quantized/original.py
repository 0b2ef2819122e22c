"""What a quantized checkpoint's tool has done to its original besides rounding: smoothing folded
into norms and into the projections before. It is found by comparison, so that the adapter branch
can undo it and adapters of the original fit.

    norm' = norm * r                  the branch reads x / r: exactly what the original's reads
    up' = up * s, down' = down / s    up's branch answers s times as much, down's reads x / s
    v' = v * s, o' = o / s            likewise

r is the quotient of the norms. s, which no file tells, is estimated: the least-squares factor of
each output's weights, off by about the rounding error / sqrt(k).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remora_build.checkpoint.directory import find_tensors
from remora_build.checkpoint.inventory import Inventory, base_digest, take_inventory
from remora_build.checkpoint.stream import TensorStream
from remora_build.families import left_out_of, naming, read_config
from remora_build.families.shape import Norm, has_bias, has_norm_bias, layer_norms
from remora_build.graph import layout
from remora_build.graph.forms import Forms, MatrixForm
from remora_build.quantized.matrix import dequantize
from remora_build.quantized.plan import QuantizedPlan, Vectors
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import Unsupported
from remora_contract.targets import PARTS, Group, Projection, matrix_name

Vector = NDArray[np.float32]
_CLOSE = 0.02  # relative: what casts between 16-bit floats may move what must be the same
_LIKENESS = 0.8  # least cosine of a weight with its original; 4-bit rounding leaves 0.99
_FOLDED = 0.1  # relative: factors closer to 1 are clipping and noise
_NORM_OF: dict[Group, Norm] = {"qkv": "norm_attention", "gate_up": "norm_mlp"}
# Whose outputs reach a projection's input, and so may have a scale for it folded in.
_BEFORE: dict[Group, tuple[Group, Projection]] = {"o": ("qkv", "v"), "down": ("gate_up", "up")}


@dataclass(frozen=True)
class Restored:
    """The plan with what the adapter branches need, and the identity of the original."""

    plan: QuantizedPlan
    base_digest: str


def restore(
    inventory: Inventory, plan: QuantizedPlan, original: Path, advance: Callable[[int], None]
) -> Restored:
    """Reads both checkpoints once; `advance(1)` after every layer. Raises Unsupported or
    CheckpointInvalid when one is no quantization of the other."""
    spec, described = inventory.naming.spec, read_config(original)
    tensors = find_tensors(original)
    names = naming(described, tensors)
    if names.spec != spec:
        raise Unsupported(f"--original {original}: its config.json describes another decoder")
    theirs = take_inventory(names, tensors, left_out_of(original))
    with TensorStream() as ours_stream, TensorStream() as stream:
        pair = _Pair(_Side(inventory, plan, ours_stream), _Side(theirs, None, stream), original)
        found: dict[str, Vectors] = {}
        for layer in range(spec.layers):
            found |= pair.layer(layer)
            advance(1)
        pair.rest()
        digest = base_digest(spec, theirs.tensors, stream.digests)
    return Restored(_corrected(plan, found), digest)


def _corrected(plan: QuantizedPlan, found: Mapping[str, Vectors]) -> QuantizedPlan:
    forms: dict[str, MatrixForm] = dict(plan.forms.own)
    vectors = dict(plan.vectors)
    for matrix, v in found.items():
        into, out = v.branch_in is not None, v.branch_out is not None
        forms[matrix] = replace(forms[matrix], branch_in=into, branch_out=out)
        vectors[matrix] = replace(vectors[matrix], branch_in=v.branch_in, branch_out=v.branch_out)
    return replace(plan, forms=Forms(own=forms), vectors=vectors)


@dataclass(frozen=True)
class _Side:
    """One of the two checkpoints; `plan` of the quantized one."""

    inventory: Inventory
    plan: QuantizedPlan | None
    stream: TensorStream

    @property
    def spec(self) -> DecoderSpec:
        return self.inventory.naming.spec

    def vector(self, *tensors: str) -> Vector:
        entries = self.inventory.tensors
        parts = [self.stream.whole(entries[t]).astype(np.float32).reshape(-1) for t in tensors]
        return np.concatenate(parts)

    def single_rows(self, tensor: str) -> Iterator[Vector]:
        """One after the other, however the bytes come."""
        for _, rows in self.stream.rows(self.inventory.tensors[tensor]):
            yield from rows.astype(np.float32)

    def norm(self, layer: int, norm: Norm) -> Vector:
        plus = np.float32(1 if self.spec.norm_plus_one else 0)
        return np.asarray(self.vector(*self.inventory.naming.norm(layer, norm)) + plus)

    def rows(self, layer: int, group: Group) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(first output, weights [m, k]) of the packed projection."""
        base = 0
        for source in self.inventory.naming.weights(layer, group):
            stored = None if self.plan is None else self.plan.stored.get(source.tensor)
            if stored is not None:
                whole = stored.read(self.stream, np.dtype(np.float32))
                yield base, dequantize(whole.columns(source.begin, source.end)).T
            else:
                for first, rows in self.stream.rows(self.inventory.tensors[source.tensor]):
                    yield base + first, rows.astype(np.float32)
            base += source.end - source.begin

    def prescale(self, layer: int, group: Group) -> Vector | None:
        return None if self.plan is None else self.plan.vectors[matrix_name(layer, group)].prescale


class _Pair:
    """The quantized checkpoint beside its original."""

    def __init__(self, ours: _Side, theirs: _Side, original: Path) -> None:
        self._ours = ours
        self._theirs = theirs
        self._original = original
        self._spec = theirs.spec

    def layer(self, layer: int) -> dict[str, Vectors]:
        """What the adapter branches of a layer need, by matrix."""
        self._small(layer)
        found: dict[Group, Vectors] = {}
        factors: dict[Group, Vector] = {}  # of a group's outputs
        for group in self._spec.groups(layer):
            smoothing = self._smoothing(layer, group, factors)
            factors[group] = self._outputs(layer, group, smoothing)
            found[group] = Vectors(
                branch_in=_unless_ones(np.asarray(1 / smoothing, np.float32)),
                branch_out=_unless_ones(factors[group]),
            )
        return {matrix_name(layer, g): v for g, v in found.items()}

    def rest(self) -> None:
        """What is outside the layers must be the same; every tensor of the original is hashed."""
        ours, theirs = self._ours.inventory.naming, self._theirs.inventory.naming
        for a, b in ((ours.final_norm, theirs.final_norm), (ours.embedding, theirs.embedding)):
            pairs = zip(self._ours.single_rows(a), self._theirs.single_rows(b), strict=True)
            for row, wanted in pairs:
                self._must_agree(a, row, wanted)
        stream, inventory = self._theirs.stream, self._theirs.inventory
        for name, entry in inventory.tensors.items():
            if name not in stream.digests:
                stream.digest(entry)

    def _smoothing(self, layer: int, group: Group, factors: Mapping[Group, Vector]) -> Vector:
        """[k]: our input of the group over the original's."""
        if group in _BEFORE:
            before, part = _BEFORE[group]
            own = factors[before][self._columns(before, part)]
            return self._spread(own) if part == "v" else own
        norm: Norm = "norm_attention" if self._spec.block == "parallel" else _NORM_OF[group]
        if norm not in layer_norms(self._spec):
            return np.ones(self._spec.hidden, np.float32)
        ours, theirs = self._ours.norm(layer, norm), self._theirs.norm(layer, norm)
        if bool(((theirs == 0) != (ours == 0)).any()) or bool((ours * theirs < 0).any()):
            raise self._differs(f"layers.{layer}.{norm}")
        return np.where(theirs == 0, np.float32(1), ours / np.where(theirs == 0, 1, theirs))

    def _spread(self, of_v: Vector) -> Vector:
        """From v's outputs [kv_heads * d] to o's inputs [heads * d]."""
        spec = self._spec
        heads = of_v.reshape(spec.kv_heads, spec.head_dim)
        return np.repeat(heads, spec.heads // spec.kv_heads, axis=0).reshape(-1)

    def _outputs(self, layer: int, group: Group, smoothing: Vector) -> Vector:
        """[n]: the factor of each output, 1 where none may be folded in or none is."""
        n = layout.group_out(self._spec, group)
        ours = np.empty((n, layout.group_in(self._spec, group)), np.float32)
        for first, rows in self._ours.rows(layer, group):
            ours[first : first + len(rows)] = rows
        prescale = self._ours.prescale(layer, group)
        divisor = smoothing if prescale is None else smoothing * prescale
        factor, likeness = np.empty(n, np.float32), np.empty(n, np.float32)
        for first, rows in self._theirs.rows(layer, group):
            here, wanted = slice(first, first + len(rows)), rows / divisor
            dot, square = _dots(ours[here], wanted), _dots(wanted, wanted)
            factor[here] = np.where(square > 0, dot / np.where(square > 0, square, 1), 1)
            length = np.sqrt(square * _dots(ours[here], ours[here]))
            likeness[here] = np.where(length > 0, dot / np.where(length > 0, length, 1), 1)
        if float(np.median(likeness)) < _LIKENESS:
            raise self._differs(matrix_name(layer, group))
        return self._folded(layer, group, factor)

    def _folded(self, layer: int, group: Group, factor: Vector) -> Vector:
        result = np.ones_like(factor)
        for part in PARTS[group]:
            here = self._columns(group, part)
            off = np.abs(np.log(np.maximum(factor[here], 1e-6)))
            if part in ("v", "up") and float(off.max()) > _FOLDED:
                result[here] = factor[here]
            elif float(np.median(off)) > _FOLDED:
                raise self._differs(f"layers.{layer}.{part}")
        return result

    def _columns(self, group: Group, part: Projection) -> slice:
        begin = 0
        for p in PARTS[group]:
            end = begin + self._spec.out_features(p)
            if p == part:
                return slice(begin, end)
            begin = end
        raise KeyError(part)

    def _small(self, layer: int) -> None:
        """The layer's other vectors must be the same."""
        ours, theirs = self._ours.inventory.naming, self._theirs.inventory.naming
        for norm in layer_norms(self._spec):
            if norm not in _NORM_OF.values():
                pair = self._ours.norm(layer, norm), self._theirs.norm(layer, norm)
                self._must_agree(f"layers.{layer}.{norm}", *pair)
            elif has_norm_bias(self._spec, norm):
                raise Unsupported("--original is not read for norms with a bias yet")
        for projection in self._spec.projections(layer):
            if has_bias(self._spec, projection) and projection not in ("v", "up"):
                pair = (
                    self._ours.vector(ours.bias(layer, projection).tensor),
                    self._theirs.vector(theirs.bias(layer, projection).tensor),
                )
                self._must_agree(f"layers.{layer}.{projection}.bias", *pair)

    def _must_agree(self, what: str, ours: Vector, theirs: Vector) -> None:
        if float(np.abs(ours - theirs).max()) > _CLOSE * float(np.abs(theirs).max()):
            raise self._differs(what)

    def _differs(self, what: str) -> Unsupported:
        return Unsupported(
            f"{what} of the quantized checkpoint is not that of --original {self._original}: give "
            "the checkpoint it was made from, or export it with --own-adapters"
        )


def _dots(a: NDArray[np.float32], b: NDArray[np.float32]) -> Vector:
    """Row by row."""
    return np.asarray(np.einsum("mk,mk->m", a, b), np.float32)


def _unless_ones(vector: Vector) -> Vector | None:
    return None if bool((vector == 1).all()) else vector.astype(np.float32)
