"""A bound adapter -> each target's part: reads its tensors one by one, and of the base what DoRA,
biases and tokens need.

Owns the order of reading and the joining of what several modules say of one target; the algebra is
`fold` and `tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from remora_build.adapters.base import Array, BaseWeights, Table
from remora_build.adapters.bound import Binding, Bound
from remora_build.adapters.fields import MERGE
from remora_build.adapters.fold import (
    Folded,
    check_finite,
    fold,
    joined,
    parted,
    row_norms,
    scaled,
    without_factors,
)
from remora_build.adapters.sidecar import Factor
from remora_build.adapters.tokens import beside, token_factor
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import AdapterInvalid, Refused
from remora_contract.targets import AdapterTarget

Factors = dict[AdapterTarget, Factor]


class Tensors(Protocol):
    """An adapter's file."""

    def float32(self, name: str) -> Array: ...

    def rows(self, name: str) -> Iterator[NDArray[Any]]: ...


class Branches(Protocol):
    """What a module's factors are once folded; `minus_initial` is another answer to it."""

    def __call__(self, binding: Binding, experts: int) -> Folded: ...


class Assembly:
    """Of one adapter on one base."""

    def __init__(
        self,
        bound: Bound,
        decoder: DecoderSpec,
        tensors: Tensors,
        branches: Branches,
        base: BaseWeights,
    ) -> None:
        self._bound = bound
        self._decoder = decoder
        self._tensors = tensors
        self._branches = branches
        self._base = base

    def factors(self) -> Factors:
        """Raises AdapterInvalid for numbers that cannot be carried, Refused where the base that is
        needed is not at hand or is another."""
        self._check_copies()
        self._check_tied()
        result: Factors = {}
        by_expert: dict[AdapterTarget, dict[int, Folded]] = {}
        scalings: dict[AdapterTarget, float] = {}
        for binding in self._bound.factors:
            folded = self._branches(binding, self._experts(binding))
            scale, bias = self._magnitudes(binding, folded), self._own_bias(binding)
            for target, expert, branch in parted(binding, folded):
                if expert is not None:
                    by_expert.setdefault(target, {})[expert] = branch
                    scalings.setdefault(target, binding.scaling)
                    continue
                columns = _columns(binding, target)
                result[target] = Factor(
                    branch.a,
                    branch.b,
                    binding.scaling,
                    None if scale is None else scale[columns],
                    None if bias is None else bias[columns],
                )
        for target, branches in by_expert.items():
            whole = joined(branches, self._decoder.copies(target.projection))
            result[target] = Factor(whole.a, whole.b, scalings[target])
        self._add_tokens(result)
        self._add_biases(result)
        return result

    def _experts(self, binding: Binding) -> int:
        return self._decoder.copies(binding.place.parts[0].target.projection)

    def _magnitudes(self, binding: Binding, folded: Folded) -> Array | None:
        """DoRA: m / ||W + (a b)^T||"""
        name = binding.tensors.get("magnitude")
        if name is None:
            return None
        magnitude = self._tensors.float32(name)
        check_finite(magnitude, name)
        norms = row_norms(self._base.weight(binding.place.parts), folded)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            scale = (magnitude / norms).astype(np.float32)
        if not np.isfinite(scale).all():
            raise AdapterInvalid(
                f"{name}: an adapted row of {binding.place.name} is zero, so DoRA cannot scale it"
            )
        return scale

    def _own_bias(self, binding: Binding) -> Array | None:
        """lora_bias: scaling * B.bias"""
        name = binding.tensors.get("B.bias")
        if name is None:
            return None
        return scaled(self._tensors.float32(name), binding.scaling, name)

    def _add_tokens(self, result: Factors) -> None:
        changes: dict[tuple[str, str], Array] = {}
        for rows in self._bound.tokens:
            new = self._tensors.float32(rows.tensor)
            check_finite(new, rows.tensor)
            table: Table = "embed" if self._decoder.tied_embeddings else rows.projection
            if (key := (rows.tensor, table)) not in changes:
                changes[key] = new - self._base.rows(table, rows.tokens)
            factor = token_factor(rows, changes[key], self._decoder.vocab)
            target = AdapterTarget(0, rows.projection)
            result[target] = beside(result[target], factor) if target in result else factor

    def _add_biases(self, result: Factors) -> None:
        for module, name in sorted(self._bound.biases.items()):
            trained = self._tensors.float32(name)
            check_finite(trained, name)
            parts = self._bound.table.modules[module]
            change = trained - self._base.bias(parts)
            for part in parts:
                own = change[part.begin : part.end]
                factor = result.get(part.target)
                if factor is None:
                    k = self._decoder.in_features(part.target.projection)
                    result[part.target] = without_factors(k, len(own), own)
                else:
                    bias = own if factor.bias is None else own + factor.bias
                    result[part.target] = replace(factor, bias=bias)
        for place, name in sorted(self._bound.norm_biases.items(), key=lambda item: item[1]):
            if not np.array_equal(self._tensors.float32(name), self._base.norm_bias(place)):
                raise AdapterInvalid(
                    f"{name} is the trained bias of a norm, which no bank can change; {MERGE}"
                )

    def _check_copies(self) -> None:
        """PEFT saves the base's embeddings beside an adapter on them; another one is a trained or
        resized one."""
        table = self._bound.table
        for module, name in self._bound.repeated.items():
            which: Table = "embed" if module == table.embedding else "head"
            if not self._base.is_copy(which, self._tensors.rows(name)):
                raise Refused(
                    f"{name} is not the base's own weight: it was trained or resized as a whole, "
                    f"or the base is another; {MERGE}"
                )

    def _check_tied(self) -> None:
        """Both halves of a tied adapter are one."""
        if not self._bound.tied:
            return
        places = {b.place.parts[0].target.projection: b for b in self._bound.factors}
        embed, head = places["embed"], places["head"]
        for one, other in ((embed.tensor_a, head.tensor_b), (embed.tensor_b, head.tensor_a)):
            if not np.array_equal(self._tensors.float32(one), self._tensors.float32(other).T):
                raise AdapterInvalid(
                    f"{one} and {other} differ, and ensure_weight_tying says that they are one"
                )


def folded_tensors(tensors: Tensors) -> Branches:
    """The branches of an adapter whose base is unchanged."""

    def branches(binding: Binding, experts: int) -> Folded:
        a, b = tensors.float32(binding.tensor_a), tensors.float32(binding.tensor_b)
        return fold(binding, a, b, experts)

    return branches


def _columns(binding: Binding, target: AdapterTarget) -> slice:
    if binding.place.layout == "embedding":
        return slice(None)
    part = next(p for p in binding.place.parts if p.target == target)
    return slice(part.begin, part.end)
