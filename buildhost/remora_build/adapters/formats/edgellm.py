"""TensorRT Edge-LLM's adapters: processed_adapter_model.safetensors and config.json.

    model.layers.{l}.{module}.lora_A.weight [k, r]
    model.layers.{l}.{module}.lora_B.weight [r, n]

in float16, the scaling folded into B; config.json is PEFT's adapter_config.json. That is what
`tensorrt-edgellm-process-lora` 0.11 writes, and for plain LoRA these are its very tensors. What it
gets wrong is not repeated when writing and refused when reading (docs/adapter-formats.md).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from remora_build.adapters.formats.carried import Carried, check_finite, check_target
from remora_build.adapters.formats.cast import cast
from remora_build.adapters.formats.manifest import manifest_for, restore
from remora_build.adapters.matching import module_path, target_of
from remora_build.adapters.settings import read_config
from remora_build.adapters.sidecar import Factor
from remora_build.adapters.tensor_file import Tensor, write_tensors
from remora_build.adapters.weights import PeftWeights
from remora_contract.adapter import MAX_RANK
from remora_contract.bundle import Bundle
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import AdapterInvalid, Unsupported
from remora_contract.targets import AdapterTarget

WEIGHTS = "processed_adapter_model.safetensors"
CONFIG = "config.json"
_PROVENANCE = "edgellm_lora_processing"  # later versions of the tool add it to the config
_TENSOR = re.compile(r"(.+)\.lora_([AB])\.weight")
_REMEDY = "Edge-LLM reads no other type"
# Fields with which the tool writes tensors that are wrong or leaves some out, without a word.
_MISREAD = {
    "use_rslora": "it scales by alpha / r, not alpha / sqrt(r)",
    "rank_pattern": "it scales every module by the same alpha / r",
    "alpha_pattern": "it scales every module by the same alpha / r",
    "use_dora": "Edge-LLM has no place for DoRA magnitudes",
    "modules_to_save": "it leaves trained norms and heads out",
    "bias": "Edge-LLM has no place for trained biases",
    "lora_bias": "Edge-LLM has no place for a bias on B",
    "fan_in_fan_out": "it guesses transposes from shapes",
    "trainable_token_indices": "Edge-LLM has no place for trained tokens",
    "target_parameters": "Edge-LLM has no place for bare parameters",
    "layer_replication": "the layers are another model's",
    "use_qalora": "Edge-LLM does not pool inputs as QALoRA does",
    "alora_invocation_tokens": "Edge-LLM does not wait for invocation tokens",
}
_NOTHING: tuple[Any, ...] = (None, False, "none", [], {})


class Names(NamedTuple):
    """Of one target's tensors."""

    a: str
    b: str


class Stated(NamedTuple):
    """What config.json says the tool used for every module."""

    rank: float
    scaling: float


def tensor_name(target: AdapterTarget, part: str) -> str:
    """`part` is A or B."""
    return f"{module_path(target)}.lora_{part}.weight"


def tensors_of(factors: Mapping[AdapterTarget, Factor]) -> dict[str, Tensor]:
    """A [k, r] and B [r, n] by Edge-LLM's names; making the values raises AdapterInvalid where
    float16 overflows."""
    tensors: dict[str, Tensor] = {}
    for target, factor in sorted(factors.items()):
        for part, values in (("A", factor.a), ("B", factor.b)):
            name = tensor_name(target, part)
            made = partial(cast, values, "float16", name, remedy=_REMEDY)
            tensors[name] = Tensor("float16", values.shape, made)
    return tensors


def config_of(carried: Carried) -> dict[str, Any]:
    """PEFT's own config, or where that is not known one that describes the factors: alpha = r, so
    that whoever divides them again finds the scaling that is left, 1."""
    if "peft_type" in carried.source_config:
        return dict(carried.source_config)
    common, _ = Counter(carried.ranks.values()).most_common(1)[0]
    modules = {module_path(t): rank for t, rank in sorted(carried.ranks.items())}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": common,
        "lora_alpha": common,
        "rank_pattern": {m: r for m, r in modules.items() if r != common},
        "alpha_pattern": {m: r for m, r in modules.items() if r != common},
        "target_modules": list(modules),
        "bias": "none",
    }


def write_edgellm(directory: Path, carried: Carried) -> None:
    """Writes both files into `directory`. Raises AdapterInvalid, OSError."""
    write_tensors(directory / WEIGHTS, tensors_of(carried.factors))
    config = json.dumps(config_of(carried), indent=2, sort_keys=True, allow_nan=False)
    (directory / CONFIG).write_text(config + "\n", encoding="utf-8")


def read_edgellm(directory: Path, bundle: Bundle) -> Carried:
    """Reads what this module or NVIDIA's tool wrote for this base.

    Raises AdapterInvalid naming file and tensor, Unsupported for what the tool writes wrongly,
    ArtifactInvalid or DocumentInvalid (damaged), Refused (another base).
    """
    manifest = manifest_for(directory, "edgellm", bundle)
    config = read_config(directory / CONFIG)
    config.pop(_PROVENANCE, None)
    stated = None if manifest else check_config(config, str(directory / CONFIG))
    with PeftWeights(directory / WEIGHTS) as weights:
        shapes = weights.shapes()
        pairs = _pairs(shapes, directory / WEIGHTS)
        for target, names in pairs.items():
            _check_shapes(target, (shapes[names.a], shapes[names.b]), bundle.decoder, stated)
        factors = {t: _factor(names, weights, stated) for t, names in sorted(pairs.items())}
    return Carried(factors, config) if manifest is None else restore(manifest, factors, directory)


def check_config(config: Mapping[str, Any], where: str) -> Stated:
    """For a directory that Remora did not write: what process-lora multiplied B with. Raises
    Unsupported naming a field with which it wrote something else than PEFT means, AdapterInvalid
    without r and lora_alpha."""
    for name, what in _MISREAD.items():
        if not any(type(config.get(name)) is type(n) and config.get(name) == n for n in _NOTHING):
            raise Unsupported(
                f"{where}: {name} = {str(config[name])[:80]}: tensorrt-edgellm-process-lora wrote "
                f"these tensors, and {what}; convert the PEFT adapter itself"
            )
    rank, alpha = (_number(config, name, where) for name in ("r", "lora_alpha"))
    if rank < 1:
        raise AdapterInvalid(f"{where}: r must be 1 or more, not {rank}")
    return Stated(rank, alpha / rank)


def _number(config: Mapping[str, Any], name: str, where: str) -> float:
    value = config.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 1e9:
        raise AdapterInvalid(f"{where}: {name} must be a number below 1e9, not {str(value)[:80]!r}")
    return float(value)


def _pairs(shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict[AdapterTarget, Names]:
    found: dict[AdapterTarget, dict[str, str]] = {}
    for name in sorted(shapes):
        match = _TENSOR.fullmatch(name)
        target = target_of(match[1]) if match else None
        if match is None or target is None:
            raise Unsupported(
                f"{path}: tensor {name[:200]} is no factor of a decoder's projection; nothing else "
                "is carried"
            )
        found.setdefault(target, {})[match[2]] = name
    for target, names in found.items():
        for part in "AB":
            if part not in names:
                raise AdapterInvalid(f"{path}: {tensor_name(target, part)} is missing")
    return {target: Names(names["A"], names["B"]) for target, names in found.items()}


def _check_shapes(
    target: AdapterTarget,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    decoder: DecoderSpec,
    stated: Stated | None,
) -> None:
    """A [k, r], B [r, n] of this base; from NVIDIA's tool also of the rank it scaled by, and not
    square, because it leaves a factor untransposed whose dimension equals the rank."""
    check_target(target, decoder)
    k, n = decoder.in_features(target.projection), decoder.out_features(target.projection)
    (a, b), name = shapes, target.name()
    rank = a[-1] if a else 0
    if a != (k, rank) or b != (rank, n):
        raise AdapterInvalid(
            f"{name}: A {list(a)} and B {list(b)} do not fit the base, which needs [{k}, r] and "
            f"[r, {n}]; give the bundle of the adapter's own base"
        )
    if not 1 <= rank <= MAX_RANK:
        raise AdapterInvalid(f"{name} has rank {rank}, outside 1 to {MAX_RANK}")
    if stated is not None and rank != stated.rank:
        raise AdapterInvalid(f"{name} has rank {rank}, {CONFIG} says {stated.rank}")
    if stated is not None and rank in (k, n):
        raise Unsupported(
            f"{name}: its rank equals a dimension, and tensorrt-edgellm-process-lora leaves such a "
            "factor untransposed; convert the PEFT adapter itself"
        )


def _factor(names: Names, weights: PeftWeights, stated: Stated | None) -> Factor:
    a, b = weights.float32(names.a), weights.float32(names.b)
    check_finite(a, f"tensor {names.a}")
    check_finite(b, f"tensor {names.b}")
    return Factor(a, b, 1.0 if stated is None else stated.scaling)
