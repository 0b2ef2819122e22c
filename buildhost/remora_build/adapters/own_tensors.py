"""The base layers' own tensors in an adapter: trained biases, and copies of the base's embeddings.

Owns which of them an adapter may and must hold; compares no values. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from remora_build.adapters.bound import NormPlace
from remora_build.adapters.fields import MERGE
from remora_build.adapters.modules import ModuleTable
from remora_build.adapters.settings import LoraSettings
from remora_build.adapters.tensor_names import Found
from remora_build.families.shape import has_bias, has_norm_bias, layer_norms
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import AdapterInvalid, Unsupported
from remora_contract.targets import MODEL_GROUPS


class BaseTensors(NamedTuple):
    """Tensors by module, by norm, and by module."""

    biases: Mapping[str, str]
    norm_biases: Mapping[NormPlace, str]
    repeated: Mapping[str, str]


def base_tensors(
    settings: LoraSettings,
    table: ModuleTable,
    found: Found,
    places: Collection[str],
    decoder: DecoderSpec,
) -> BaseTensors:
    """Raises Unsupported for a whole trained module, AdapterInvalid for a bias that the config or
    the base does not have, and for one that is missing."""
    biased = set(_biased(table, decoder))
    norms = dict(_norm_biases(table, decoder))
    biases: dict[str, str] = {}
    norm_biases: dict[NormPlace, str] = {}
    repeated: dict[str, str] = {}
    for module, parts in found.items():
        if "weight" in parts:
            if module not in (table.embedding, table.head):
                raise Unsupported(
                    f"tensor {parts['weight'][:200]} is the trained weight of a whole module "
                    f"(modules_to_save); it is no low-rank change: {MERGE}"
                )
            repeated[module] = parts["weight"]
        if "bias" in parts:
            if settings.bias == "none" or not (module in biased or f"{module}.bias" in norms):
                raise _odd_bias(parts["bias"], settings)
            if module in biased:
                biases[module] = parts["bias"]
            else:
                norm_biases[norms[f"{module}.bias"]] = parts["bias"]
    _check_all_there(settings, biased, places, biases)
    return BaseTensors(biases, norm_biases, repeated)


def _biased(table: ModuleTable, decoder: DecoderSpec) -> Iterator[str]:
    for module, parts in table.modules.items():
        projection = parts[0].target.projection
        if projection not in MODEL_GROUPS and has_bias(decoder, projection):
            yield module


def _norm_biases(table: ModuleTable, decoder: DecoderSpec) -> Iterator[tuple[str, NormPlace]]:
    """(name in a checkpoint, place)"""
    if decoder.norm_bias:
        yield table.naming.final_norm_bias, NormPlace()
    for layer in range(decoder.layers):
        for norm in layer_norms(decoder):
            if has_norm_bias(decoder, norm):
                yield table.naming.norm_bias(layer, norm), NormPlace(layer, norm)


def _odd_bias(tensor: str, settings: LoraSettings) -> AdapterInvalid:
    if settings.bias == "none":
        return AdapterInvalid(f"tensor {tensor[:200]} is a trained bias, and the config says none")
    return AdapterInvalid(f"tensor {tensor[:200]} is a bias that this base does not have")


def _check_all_there(
    settings: LoraSettings,
    biased: Collection[str],
    places: Collection[str],
    biases: Mapping[str, str],
) -> None:
    if settings.bias == "none":
        return
    needed = biased if settings.bias == "all" else set(biased) & set(places)
    missing = sorted(set(needed) - set(biases))
    if missing:
        raise AdapterInvalid(
            f"the config says bias = {settings.bias}, and the bias of {missing[0]} is missing "
            f"({len(missing)} in all): PEFT would answer with the base's; if that is meant, set "
            'bias to "none" in adapter_config.json'
        )
