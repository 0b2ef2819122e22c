"""Which tensor is whose: decided from names, shapes and the config before a byte is read.

Owns the rule that every tensor is bound and every selected module has its tensors. Pure: works on
names and shapes only. A is [r, k] and B [n, r], PEFT's convention; nothing is guessed by shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from remora_build.adapters.bound import FACTORS, Binding, Bound, Place
from remora_build.adapters.matching import rank_and_alpha, selects, selects_parameter
from remora_build.adapters.modules import ModuleTable, module_table
from remora_build.adapters.own_tensors import base_tensors
from remora_build.adapters.settings import LoraSettings
from remora_build.adapters.shapes import Shape, check_shapes, trained_on
from remora_build.adapters.tensor_names import Found, Part, sort_tensors, unbound
from remora_build.adapters.tokens import bind_tokens
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import AdapterInvalid, Unsupported

_OWN: frozenset[Part] = frozenset({"bias", "weight", "tokens"})  # of the base layer, not of LoRA
_LAYER = re.compile(r"\.layers\.(\d{1,6})\.")
_TIED_NAMES = ("A", "B")


def bind(settings: LoraSettings, shapes: Mapping[str, Shape], decoder: DecoderSpec) -> Bound:
    """Binds every tensor or raises: Unsupported for what is known and not carried, AdapterInvalid
    for the rest (unknown, missing, misshapen, made for another base)."""
    found = sort_tensors(shapes)
    table = module_table(decoder, found)
    tied = _is_tied(settings, table, decoder)
    places = dict(_places(settings, table, found, tied))
    factors = {m: {p: t for p, t in parts.items() if p not in _OWN} for m, parts in found.items()}
    _check_known({m for m, parts in factors.items() if parts}, places, table, settings, decoder)
    _check_complete(factors, places, settings)
    if not places:
        raise AdapterInvalid("target_modules selects no projection of this decoder")
    bound = Bound(
        table,
        tuple(_binding(settings, places[m], factors[m]) for m in sorted(places)),
        bind_tokens(settings, table, found, decoder),
        *base_tensors(settings, table, found, places, decoder),
        tied,
    )
    check_shapes(bound, shapes, decoder, settings)
    return bound


def _places(
    settings: LoraSettings, table: ModuleTable, found: Found, tied: bool
) -> Iterator[tuple[str, Place]]:
    """(module as the tensors name it, place) of all that the config selects."""
    absent = _stacked_experts(settings, table, found)
    for module, parts in table.modules.items():
        if module not in absent and selects(settings, module, linear=module in table.linear):
            layout = "embedding" if module == table.embedding else "linear"
            yield module, Place(module, layout, parts)  # type: ignore[arg-type]
        elif selects_parameter(settings, weight := f"{module}.weight"):
            if module in (table.embedding, table.head):
                raise Unsupported(
                    f"target_parameters selects {weight}: PEFT adapts an embedding or head by "
                    "target_modules; so must this adapter be trained"
                )
            yield module, Place(weight, "linear", parts)
        elif tied and module == table.head:
            yield module, Place(module, "linear", parts)
    chosen = [p for p in table.parameters if selects_parameter(settings, p)]
    for parameter, module in table.nested(chosen).items():
        yield module, Place(parameter, "experts", table.parameters[parameter])


def _stacked_experts(settings: LoraSettings, table: ModuleTable, found: Found) -> set[str]:
    """Modules of single experts that the trained model did not have, its experts being stacked.
    That depends on the version of transformers. The tensors tell: with none of any expert, a name
    that other modules have too selected only those. A name that only experts have must have
    some."""
    single = {m for m, parts in table.modules.items() if parts[0].expert is not None}
    if single & set(found):
        return set()
    elsewhere = {
        _last(m)
        for m in table.modules.keys() - single
        if selects(settings, m, linear=m in table.linear)
    }
    return {m for m in single if _last(m) in elsewhere}


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _is_tied(settings: LoraSettings, table: ModuleTable, decoder: DecoderSpec) -> bool:
    """Whether PEFT gave the tied head the embedding's adapter."""
    wanted = settings.weight_tying and decoder.tied_embeddings
    return wanted and selects(settings, table.embedding, linear=False)


def _check_known(
    modules: Iterable[str],
    places: Mapping[str, Place],
    table: ModuleTable,
    settings: LoraSettings,
    decoder: DecoderSpec,
) -> None:
    """Every module with factors is one that the config selects."""
    extra = []
    for module in sorted(set(modules) - set(places)):
        match = _LAYER.search(module)
        if match and int(match[1]) >= decoder.layers:
            raise AdapterInvalid(
                f"the adapter changes layer {match[1]}, the base has {decoder.layers} layers: "
                + trained_on(settings)
            )
        if module in table.unadaptable:
            raise Unsupported(
                f"{module} chooses or weighs experts: an adapter on it is not carried; train "
                "without it, or merge it with `remora-build merge`"
            )
        if module not in table.modules and not _is_container(module, table):
            raise unbound(f"base_model.model.{module}.lora_A.weight")
        extra.append(module)
    if extra:
        raise AdapterInvalid(
            f"tensors for modules that the config does not select: {listed(extra)}"
        )


def _is_container(module: str, table: ModuleTable) -> bool:
    stem = module.removesuffix(".base_layer")
    return any(p.rpartition(".")[0] == stem for p in table.parameters)


def _check_complete(
    factors: Mapping[str, Mapping[Part, str]], places: Mapping[str, Place], settings: LoraSettings
) -> None:
    """Every selected module has the tensors that the config implies, and no other."""
    missing, surplus = [], []
    for module, place in sorted(places.items()):
        needed, have = _needed(place, settings), factors.get(module, {})
        missing += [f"{module}.lora_{p}" for p in needed if p not in have]
        surplus += [tensor for part, tensor in have.items() if part not in needed]
    if missing:
        raise AdapterInvalid(
            f"the config selects modules whose tensors are missing: {listed(missing)}"
        )
    if surplus:
        raise AdapterInvalid(
            f"the config (use_dora, lora_bias, target_modules) does not say what to do with "
            f"{listed(surplus)}"
        )


def _needed(place: Place, settings: LoraSettings) -> list[Part]:
    needed: list[Part] = list(FACTORS[place.layout])
    if settings.use_dora:
        needed.append("magnitude")
    if settings.lora_bias and place.layout == "linear":
        needed.append("B.bias")
    return needed


def _binding(settings: LoraSettings, place: Place, tensors: Mapping[Part, str]) -> Binding:
    rank, alpha = rank_and_alpha(settings, place.name)
    return Binding(place, tensors, rank, settings.scaling(rank, alpha))


def listed(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
