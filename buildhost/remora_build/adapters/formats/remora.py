"""Remora's own sidecars, read back for conversion; `remora_build.adapters.sidecar` writes them."""

from __future__ import annotations

from pathlib import Path

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
        factors = {t.target: _factor(t, weights) for t in adapter.targets}
    return Carried(factors, adapter.source_config)


def _check_tensors(adapter: Adapter, shapes: dict[str, tuple[int, ...]], bundle: Bundle) -> None:
    needed = {
        name: shape
        for t in adapter.targets
        for name, shape in (
            (t.target.tensor_a(), (bundle.decoder.in_features(t.projection), t.rank)),
            (t.target.tensor_b(), (t.rank, bundle.decoder.out_features(t.projection))),
        )
    }
    for name in sorted(set(shapes) - set(needed)):
        raise Unsupported(
            f"{WEIGHTS_FILE}: tensor {name[:200]} cannot be carried to another format yet; only "
            "plain LoRA factors can"
        )
    for name, shape in needed.items():
        if shapes.get(name) != shape:
            have = list(shapes[name]) if name in shapes else "missing"
            raise AdapterInvalid(f"{WEIGHTS_FILE}: {name} is {have}, the base needs {list(shape)}")


def _factor(target: TargetRank, weights: PeftWeights) -> Factor:
    names = (target.target.tensor_a(), target.target.tensor_b())
    a, b = map(weights.float32, names)
    check_finite(a, names[0])
    check_finite(b, names[1])
    return Factor(a, b, target.scaling)
