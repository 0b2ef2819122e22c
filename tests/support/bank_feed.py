"""The portable graph's adapter inputs for converted adapters, packed the plain way docs/graph.md
describes: whatever a bundle's graph takes, from what adapter.safetensors holds.

    model.adapter_feed = feed(bundle, [sidecar_dir], [[1.0], [0.0]])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from remora_contract import targets
from remora_contract.adapter import WEIGHTS_FILE
from remora_contract.bundle import Bundle, bank_groups, model_bank_groups
from remora_contract.targets import EXPERT_GROUPS, PARTS, AdapterTarget, Group

Stored = dict[str, np.ndarray]


def feed(
    bundle: Bundle, residents: Sequence[Path], weights: Sequence[Sequence[float]]
) -> dict[str, np.ndarray]:
    """`weights[row][i]` is how much of resident adapter i that row takes."""
    stored = [load_file(directory / WEIGHTS_FILE) for directory in residents]
    made: dict[str, np.ndarray] = {}
    for layer, group in _places(bundle):
        widths = {p: [_width(s, p) for s in stored] for p in PARTS[group]}
        gate = [
            np.concatenate(
                [np.full(widths[p][i], w) for p in PARTS[group] for i, w in enumerate(row)]
            )
            if row
            else np.zeros(0)
            for row in weights
        ]
        made[targets.lora_gate(group)] = np.array(gate)[:, None]
        made |= _factors(bundle, layer, group, stored, widths)
        made |= _vectors(bundle, layer, group, stored, weights)
    return {name: value.astype(bundle.graph.dtype) for name, value in made.items()}


def _places(bundle: Bundle) -> Iterator[tuple[int, Group]]:
    for layer in range(bundle.decoder.layers):
        for group in bank_groups(bundle.decoder, bundle.graph, layer):
            yield layer, group
    for group in model_bank_groups(bundle.graph):
        yield 0, group


def _width(stored: Stored, projection: targets.Projection) -> int:
    """The same in every layer."""
    ends = (f".{projection}.a", f"{projection}.a")
    return max(
        (v.shape[-1] for n, v in stored.items() if n == ends[1] or n.endswith(ends[0])), default=0
    )


def _factors(bundle, layer, group, stored, widths):
    decoder, parts = bundle.decoder, PARTS[group]
    k, outs = decoder.in_features(parts[0]), [decoder.out_features(p) for p in parts]
    total = sum(sum(w) for w in widths.values())
    lead = (decoder.copies(parts[0]),) if group in EXPERT_GROUPS else ()
    a, b = np.zeros((*lead, k, total)), np.zeros((*lead, total, sum(outs)))
    at = 0
    for i, part in enumerate(parts):
        first = sum(outs[:i])
        for one, width in zip(stored, widths[part], strict=True):
            target = AdapterTarget(layer, part)
            if target.tensor_a() in one:
                rank = one[target.tensor_a()].shape[-1]
                a[..., at : at + rank] = one[target.tensor_a()]
                b[..., at : at + rank, first : first + outs[i]] = one[target.tensor_b()]
            at += width
    return {targets.lora_a(layer, group): a, targets.lora_b(layer, group): b}


def _vectors(bundle, layer, group, stored, weights):
    parts = PARTS[group]
    outs = [bundle.decoder.out_features(p) for p in parts]
    scale, bias = (np.full((len(weights), 1, sum(outs)), v) for v in (1.0, 0.0))
    for row, mix in enumerate(weights):
        for one, weight in zip(stored, mix, strict=True):
            for i, part in enumerate(parts):
                columns = slice(sum(outs[:i]), sum(outs[: i + 1]))
                target = AdapterTarget(layer, part)
                if weight and target.tensor_scale() in one:
                    scale[row, 0, columns] = one[target.tensor_scale()]
                if target.tensor_bias() in one:
                    bias[row, 0, columns] += weight * one[target.tensor_bias()]
    made = {}
    if bundle.graph.dora and group not in EXPERT_GROUPS:
        made[targets.lora_scale(layer, group)] = scale
    if bundle.graph.adapter_bias and group not in ("embed", *EXPERT_GROUPS):
        made[targets.lora_bias(layer, group)] = bias
    return made
