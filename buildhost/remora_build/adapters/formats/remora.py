"""Remora's own sidecars, read back for conversion; `remora_build.adapters.sidecar` writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from remora_build.adapters.formats.carried import (
    Carried,
    check_finite,
    check_target,
    refuse_more,
)
from remora_build.adapters.sidecar import Factor
from remora_build.adapters.weights import PeftWeights
from remora_contract.adapter import WEIGHTS_FILE, Adapter, TargetRank, load_adapter
from remora_contract.bundle import Bundle, verify_files
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import AdapterInvalid, Refused, Unsupported


def read_remora(directory: Path, bundle: Bundle) -> Carried:
    """Raises Refused (made for another base), Unsupported naming what a sidecar holds beside plain
    factors, AdapterInvalid, ArtifactInvalid or DocumentInvalid (damaged)."""
    adapter = load_adapter(directory)
    refuse_more(adapter)
    if adapter.base_digest != bundle.base_digest:
        raise Refused(
            f"{directory} was made for base {adapter.base_digest}, the bundle is of "
            f"{bundle.base_digest}: give the bundle of its base with --base"
        )
    for entry in adapter.targets:
        check_target(entry.target, bundle.decoder)
    verify_files(directory, adapter.files)
    with PeftWeights(directory / WEIGHTS_FILE) as weights:
        _check_tensors(adapter, weights.shapes(), bundle)
        factors = {t.target: _factor(t, weights, bundle.decoder) for t in adapter.targets}
    return Carried(factors, adapter.source_config, adapter.invocation_tokens)


def _check_tensors(adapter: Adapter, shapes: dict[str, tuple[int, ...]], bundle: Bundle) -> None:
    needed = {n: s for t in adapter.targets for n, s in _shapes(t, bundle.decoder).items()}
    for name in sorted(set(shapes) - set(needed)):
        raise Unsupported(
            f"{WEIGHTS_FILE}: tensor {name[:200]} is none that adapter.json lists; this version "
            "does not know it and carries nothing it cannot name"
        )
    for name, shape in needed.items():
        if shapes.get(name) != shape:
            have = list(shapes[name]) if name in shapes else "missing"
            raise AdapterInvalid(f"{WEIGHTS_FILE}: {name} is {have}, the base needs {list(shape)}")


def _shapes(entry: TargetRank, decoder: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor the target has. One with nothing but a bias has no factors."""
    k, n = decoder.in_features(entry.projection), decoder.out_features(entry.projection)
    target, shapes = entry.target, {}
    if entry.rank:
        shapes = {target.tensor_a(): (k, entry.rank), target.tensor_b(): (entry.rank, n)}
    vectors = ((entry.dora, target.tensor_scale()), (entry.bias, target.tensor_bias()))
    return shapes | {name: (n,) for there, name in vectors if there}


def _factor(entry: TargetRank, weights: PeftWeights, decoder: DecoderSpec) -> Factor:
    target = entry.target
    values = {name: weights.float32(name) for name in _shapes(entry, decoder)}
    for name, tensor in values.items():
        check_finite(tensor, name)
    k, n = decoder.in_features(entry.projection), decoder.out_features(entry.projection)
    return Factor(
        values.get(target.tensor_a(), np.zeros((k, 0), np.float32)),
        values.get(target.tensor_b(), np.zeros((0, n), np.float32)),
        entry.scaling,
        values.get(target.tensor_scale()),
        values.get(target.tensor_bias()),
    )
