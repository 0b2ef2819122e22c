"""Which modules an adapter's config selects, at which rank and alpha: PEFT's rules, exactly.

Works on module paths as the base model has them, `model.layers.3.self_attn.q_proj`; knows no
tensors, no files and no decoder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

from remora_build.adapters.budget import first_match
from remora_build.adapters.settings import ALL_LINEAR, LoraSettings
from remora_build.families.naming import PLAIN_PROJECTIONS
from remora_contract.targets import AdapterTarget

V = TypeVar("V")

_PROJECTION_OF = {module: projection for projection, module in PLAIN_PROJECTIONS.items()}
_MODULE = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.([a-z_]+\.[a-z_]+)")


def module_path(target: AdapterTarget) -> str:
    """`model.layers.3.self_attn.q_proj`, where a model names its modules as Llama does."""
    return f"model.layers.{target.layer}.{PLAIN_PROJECTIONS[target.projection]}"


def target_of(module: str) -> AdapterTarget | None:
    """Inverse of `module_path`; None for any other module."""
    match = _MODULE.fullmatch(module)
    if match is None or match[2] not in _PROJECTION_OF:
        return None
    return AdapterTarget(int(match[1]), _PROJECTION_OF[match[2]])


def selects(settings: LoraSettings, module: str, *, linear: bool) -> bool:
    """PEFT's check_target_module_exists. `linear`: whether "all-linear" means this module too.

    Raises AdapterInvalid for a pattern that is no regular expression.
    """
    if _named(settings.exclude_modules, module):
        return False
    chosen = settings.target_modules
    if isinstance(chosen, str):
        return linear if chosen.lower() == ALL_LINEAR else _fullmatch(chosen, module)
    if module in chosen:  # a full path overrules layers_to_transform
        return True
    return _named(chosen, module) and _layer_selected(settings, module)


def selects_parameter(settings: LoraSettings, parameter: str) -> bool:
    """Whether target_parameters names it, whole or its end at a dot."""
    return _named(settings.target_parameters, parameter)


def rank_and_alpha(settings: LoraSettings, module: str) -> tuple[int, float]:
    rank = _by_pattern(settings.rank_pattern, module, settings.r)
    return rank, _by_pattern(settings.alpha_pattern, module, settings.lora_alpha)


def _named(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return _fullmatch(names, module)
    parts = module.split(".")
    ends = (".".join(parts[i:]) for i in range(len(parts)))
    return not _set(names).isdisjoint(ends)


@lru_cache(maxsize=8)
def _set(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(names)


def _layer_selected(settings: LoraSettings, module: str) -> bool:
    if not settings.layers_to_transform:
        return True
    lists = [rf"(?:^|.*?\.){p}" for p in settings.layers_pattern] or [r".*?\.[^.]*"]
    match = first_match("match", [rf"{each}\.(?P<idx>\d+)\." for each in lists], module)
    return match is not None and int(match.idx or -1) in settings.layers_to_transform


def _by_pattern(patterns: Sequence[tuple[str, V]], module: str, default: V) -> V:
    """PEFT's get_pattern_key: the first pattern that matches the path's end, at a dot."""
    match = first_match("match", [rf"(.*\.)?({pattern})$" for pattern, _ in patterns], module)
    return default if match is None else patterns[match.index][1]


def _fullmatch(pattern: str, module: str) -> bool:
    return first_match("fullmatch", (pattern,), module) is not None
