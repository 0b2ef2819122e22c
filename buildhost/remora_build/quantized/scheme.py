"""Which tool quantized a checkpoint, and how: from its config files to a Scheme."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from remora_build.checkpoint.directory import CONFIG, check_directory, read_json
from remora_build.quantized import autoawq, compressed_scheme, fp8, gptq, modelopt
from remora_build.quantized.section import Scheme, Section
from remora_contract.errors import CheckpointInvalid, Unsupported

MODELOPT_CONFIG = "hf_quant_config.json"
MODELOPT = "modelopt"
METHODS: dict[str, Callable[[Section], Scheme]] = {
    "awq": autoawq.scheme,
    "compressed-tensors": compressed_scheme.scheme,
    "fp8": fp8.scheme,
    "gptq": gptq.scheme,
}


def read_scheme(directory: Path) -> Scheme | None:
    """None for a checkpoint that is not quantized. Raises CheckpointInvalid, Unsupported."""
    check_directory(directory)
    config, path = read_json(directory / CONFIG), directory / CONFIG
    nested = config.get("text_config")
    section = config.get("quantization_config")
    if section is None and isinstance(nested, dict):
        section = nested.get("quantization_config")
    beside = directory / MODELOPT_CONFIG
    if not section and not beside.is_file():
        return None
    told = section or {"quant_method": MODELOPT}
    if not isinstance(told, dict):
        raise CheckpointInvalid(f"{path}: quantization_config is no table")
    method = told.get("quant_method")
    if method == MODELOPT:
        return _modelopt(told, path, beside)
    read = METHODS.get(method) if isinstance(method, str) else None
    if read is None:
        known = ", ".join((MODELOPT, *METHODS))
        raise Unsupported(
            f"{path}: quant_method is {str(method)[:80]!r}, which is not read ({known} are): "
            "export the original checkpoint; remora quantizes itself (--quant, --int4-block)"
        )
    return read(Section(told, f"{path}: quantization_config"))


def _modelopt(told: Mapping[str, Any], path: Path, beside: Path) -> Scheme:
    """hf_quant_config.json says more than what ModelOpt puts into config.json."""
    if not beside.is_file():
        return modelopt.scheme(Section(told, f"{path}: quantization_config"), _group_size(told))
    table = read_json(beside).get("quantization")
    if not isinstance(table, dict):
        raise CheckpointInvalid(f"{beside}: has no table 'quantization'")
    if "quant_algo" in told and told["quant_algo"] != table.get("quant_algo"):
        raise CheckpointInvalid(
            f"{beside} says quant_algo {table.get('quant_algo')!r}, {path} {told['quant_algo']!r}"
        )
    return modelopt.scheme(Section(table, str(beside)), None)


def _group_size(told: Mapping[str, Any]) -> Any:
    """From config.json's groups."""
    groups = told.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = first.get("weights") if isinstance(first, dict) else None
    return weights.get("group_size") if isinstance(weights, dict) else None
