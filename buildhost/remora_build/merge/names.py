"""Names of an adapter's tensors -> what each one is. Pure: names only.

PEFT writes, all below `base_model.model.`:
    M.lora_A.weight  M.lora_B.weight            factors of module M (`.lora_B.bias` with lora_bias)
    M.lora_embedding_A  M.lora_embedding_B      factors of an embedding
    M.lora_magnitude_vector                     DoRA's magnitudes
    M.token_adapter.trainable_tokens_delta      trained rows of an embedding
    M.base_layer.P  or  M.P                     parameter P of M as a whole
A `.base_layer` before a factor is one nesting of target_parameters on the same module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from remora_build.adapters.tensor_names import COMPILED, SAVED_COMPILED
from remora_contract.errors import AdapterInvalid

Part = Literal["A", "B", "bias", "embedding_A", "embedding_B", "magnitude"]

_MAX_NAME_CHARS = 500
_PREFIX = "base_model.model."
_TOKENS = ".token_adapter.trainable_tokens_delta"
_FACTOR = re.compile(r"(?P<module>.+?)(?P<nesting>(?:\.base_layer)*)\.lora_(?P<part>[A-Za-z_.]+)")
_WHOLE = re.compile(r"(?P<module>.+?)(?P<base>\.base_layer)?\.(?P<parameter>[^.]+)")
_PARTS: Mapping[str, Part] = {
    "A.weight": "A",
    "B.weight": "B",
    "B.bias": "bias",
    "embedding_A": "embedding_A",
    "embedding_B": "embedding_B",
    "magnitude_vector": "magnitude",
    "magnitude_vector.weight": "magnitude",
}


@dataclass(frozen=True)
class Factors:
    """One adapted module: part -> tensor name. `nesting` counts its `.base_layer`s."""

    module: str
    nesting: int
    parts: Mapping[Part, str]


@dataclass(frozen=True)
class Whole:
    """A parameter saved as a whole; `of_base`: below the adapted module's base_layer."""

    tensor: str
    module: str
    parameter: str
    of_base: bool


@dataclass(frozen=True)
class AdapterTensors:
    """Every tensor of an adapter, each in exactly one place."""

    factors: tuple[Factors, ...]
    wholes: tuple[Whole, ...]
    tokens: Mapping[str, str]  # module -> tensor


def sort_tensors(names: Iterable[str], training_tensors: tuple[str, ...] = ()) -> AdapterTensors:
    """`training_tensors`: how names begin that only training reads; they are left out. Raises
    AdapterInvalid naming the first tensor that PEFT does not write so."""
    factors: dict[tuple[str, int], dict[Part, str]] = {}
    wholes: list[Whole] = []
    tokens: dict[str, str] = {}
    for name in sorted(names):
        path = _path(name)
        if any(f".{begin}" in path for begin in training_tensors):
            continue
        match = _FACTOR.fullmatch(path)
        if match is not None and match["part"] in _PARTS:
            parts = factors.setdefault((match["module"], match["nesting"].count(".")), {})
            _put(parts, _PARTS[match["part"]], name)
        elif path.endswith(_TOKENS):
            tokens[path.removesuffix(_TOKENS)] = name
        else:
            wholes.append(_whole(path, name))
    listed = tuple(Factors(module, nesting, parts) for (module, nesting), parts in factors.items())
    return AdapterTensors(listed, tuple(wholes), tokens)


def _path(name: str) -> str:
    if len(name) > _MAX_NAME_CHARS:
        raise AdapterInvalid(f"tensor {name[:80]}… has a name of {len(name)} characters")
    if COMPILED in name:
        raise AdapterInvalid(f"tensor {name} {SAVED_COMPILED}")
    path = name.removeprefix(_PREFIX)
    if path == name:
        raise AdapterInvalid(f"tensor {name} is not named as PEFT saves it ({_PREFIX}…)")
    return path


def _put(parts: dict[Part, str], part: Part, tensor: str) -> None:
    if part in parts:
        raise AdapterInvalid(f"tensor {tensor} repeats {parts[part]}")
    parts[part] = tensor


def _whole(path: str, tensor: str) -> Whole:
    match = _WHOLE.fullmatch(path)
    if match is None or ".lora_" in path or ".token_adapter." in path:
        raise AdapterInvalid(
            f"tensor {tensor} is none that PEFT's LoRA saves; nothing is merged unnamed"
        )
    return Whole(tensor, match["module"], match["parameter"], match["base"] is not None)
