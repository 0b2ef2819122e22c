"""Which tensor is whose A or B: decided from names, shapes and the config before a byte is read.

Owns the rule that every tensor is bound and every selected module has its tensors. Pure: works on
names and shapes only. A is [r, k] and B [n, r], PEFT's convention; nothing is guessed by shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from remora_build.adapters.matching import (
    module_path,
    rank_and_alpha,
    selected_targets,
    target_of,
)
from remora_build.adapters.settings import LoraSettings
from remora_contract.bundle import DecoderSpec
from remora_contract.errors import AdapterInvalid, Unsupported
from remora_contract.targets import AdapterTarget

Shape = tuple[int, ...]

_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# What else PEFT saves, by a part of the tensor's name.
_NOT_CARRIED = (
    ("lora_magnitude_vector", "a DoRA magnitude vector; DoRA is not carried yet"),
    ("lora_embedding_", "an adapter on an embedding; only projections are adapted"),
    ("lora_B.bias", "a bias on lora_B (lora_bias); it is not carried"),
    ("lora_diag", "KaSA's diagonal; it is not carried"),
    ("modules_to_save", "a whole trained module (modules_to_save); it is not carried"),
    ("token_adapter", "trained token embeddings; they are not carried"),
    ("embed_tokens", "the embedding; only projections are adapted"),
    ("lm_head", "the output head; only projections are adapted"),
    (".bias", "a trained bias; it is not carried"),
)


@dataclass(frozen=True)
class Binding:
    """One target's tensors: A `tensor_a` [rank, k], B `tensor_b` [n, rank], scaling yet to fold."""

    target: AdapterTarget
    tensor_a: str
    tensor_b: str
    rank: int
    scaling: float


def bind(
    settings: LoraSettings, shapes: Mapping[str, Shape], decoder: DecoderSpec
) -> tuple[Binding, ...]:
    """Binds every tensor or raises: Unsupported for what is known and not carried, AdapterInvalid
    for the rest (unknown, missing, misshapen, made for another base)."""
    found = _by_target(shapes)
    selected = selected_targets(settings, decoder)
    _check_base(found, settings, decoder)
    _check_complete(found, selected)
    return tuple(_binding(t, found[t], settings, shapes, decoder) for t in sorted(selected))


def _by_target(names: Iterable[str]) -> dict[AdapterTarget, dict[str, str]]:
    """target -> {"A": tensor name, "B": tensor name}."""
    found: dict[AdapterTarget, dict[str, str]] = {}
    for name in sorted(names):
        match = _TENSOR.fullmatch(name)
        target = target_of(match[1]) if match else None
        if match is None or target is None:
            raise _unbound(name)
        found.setdefault(target, {})[match[2]] = name
    return found


def _unbound(name: str) -> AdapterInvalid | Unsupported:
    for part, what in _NOT_CARRIED:
        if part in name:
            return Unsupported(f"tensor {name} is {what}")
    return AdapterInvalid(
        f"tensor {name[:200]} belongs to no projection of this decoder and cannot be bound; "
        "PEFT names them base_model.model.<module>.lora_A.weight (and lora_B), the modules being "
        "model.layers.<n>.self_attn.{q,k,v,o}_proj and .mlp.{gate,up,down}_proj"
    )


def _check_base(
    found: Iterable[AdapterTarget], settings: LoraSettings, decoder: DecoderSpec
) -> None:
    deepest = max((t.layer for t in found), default=0)
    if deepest >= decoder.layers:
        raise AdapterInvalid(
            f"the adapter changes layer {deepest}, the base has {decoder.layers} layers: "
            + _trained_on(settings)
        )


def _check_complete(
    found: Mapping[AdapterTarget, Mapping[str, str]], selected: frozenset[AdapterTarget]
) -> None:
    missing = [
        f"{module_path(t)}.lora_{part}"
        for t in sorted(selected)
        for part in "AB"
        if part not in found.get(t, {})
    ]
    if missing:
        raise AdapterInvalid(
            f"the config selects modules whose tensors are missing: {_listed(missing)}"
        )
    extra = [module_path(t) for t in sorted(set(found) - selected)]
    if extra:
        raise AdapterInvalid(
            f"tensors for modules that the config does not select: {_listed(extra)}"
        )
    if not selected:
        raise AdapterInvalid("target_modules selects no projection of this decoder")


def _binding(
    target: AdapterTarget,
    names: Mapping[str, str],
    settings: LoraSettings,
    shapes: Mapping[str, Shape],
    decoder: DecoderSpec,
) -> Binding:
    rank, alpha = rank_and_alpha(settings, module_path(target))
    k, n = decoder.in_features(target.projection), decoder.out_features(target.projection)
    _check_shape(names["A"], shapes[names["A"]], (rank, k), rank_axis=0, settings=settings)
    _check_shape(names["B"], shapes[names["B"]], (n, rank), rank_axis=1, settings=settings)
    return Binding(target, names["A"], names["B"], rank, settings.scaling(rank, alpha))


def _check_shape(
    name: str, have: Shape, need: tuple[int, int], *, rank_axis: int, settings: LoraSettings
) -> None:
    if have == need:
        return
    if len(have) == 2 and have[1 - rank_axis] == need[1 - rank_axis]:
        raise AdapterInvalid(
            f"{name} has rank {have[rank_axis]}, the config says {need[rank_axis]} "
            "(r and rank_pattern)"
        )
    raise AdapterInvalid(
        f"{name} is {list(have)}, this base needs {list(need)}: {_trained_on(settings)}"
    )


def _trained_on(settings: LoraSettings) -> str:
    said = f" (its config says {settings.base_name!r})" if settings.base_name else ""
    return f"it was trained on another base{said}; give the bundle of that base with --base"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
