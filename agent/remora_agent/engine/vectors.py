"""What stands around a mix's factors, as every backend binds it: DoRA's factors and biases. Pure.

    y = scale * (x W + ((x A) * gate) B) + base bias + bias      scale, bias [n] of a packed group

Without any, scale is 1 and bias 0. Biases of several adapters are summed by weight; DoRA's factors
were made for one adapter's weights and stand alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from remora_agent.bank.weights import AdapterWeights
from remora_contract.bank_inputs import VectorKind, neutral
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import RequestInvalid
from remora_contract.targets import PARTS, AdapterTarget, Group

_FLOAT32 = np.dtype(np.float32)
Entries = Sequence[tuple[AdapterWeights, float]]


def check_together(entries: Entries) -> None:
    """Raises RequestInvalid for a mix in which DoRA is not alone and whole: its factors were made
    for these very weights, and no scaled or summed ones are right for others."""
    for weights, weight in entries:
        if weights.dora and (len(entries) > 1 or weight != 1.0):
            raise RequestInvalid(
                f"adapter {weights.digest[:19]} is a DoRA adapter: it answers alone and with "
                f"weight 1, not with weight {weight:g} beside {len(entries) - 1} other(s)"
            )


def packed(
    decoder: DecoderSpec,
    kind: VectorKind,
    layer: int,
    group: Group,
    entries: Entries,
    dtype: np.dtype[np.floating] = _FLOAT32,
) -> NDArray[np.floating] | None:
    """[n] of a mix in `dtype`; None where it is neutral throughout. An adapter that is prepared in
    it is only copied, where it is alone."""
    widths = [decoder.out_features(p) for p in PARTS[group]]
    copied = kind == "scale" or [weight for _, weight in entries] == [1.0]
    found = None
    at = 0
    for part, width in zip(PARTS[group], widths, strict=True):
        for weights, weight in entries:
            vectors = weights.vectors.get(AdapterTarget(layer, part))
            own = None if vectors is None else getattr(vectors, kind)
            if own is not None:
                if found is None:
                    found = np.full(sum(widths), neutral(kind), dtype if copied else _FLOAT32)
                if copied:
                    found[at : at + width] = own
                else:
                    found[at : at + width] += np.float32(weight) * own.astype(np.float32)
        at += width
    if found is None:
        return None
    with np.errstate(over="ignore"):  # by a large weight: the row's own answer suffers
        return found.astype(dtype, copy=False)
