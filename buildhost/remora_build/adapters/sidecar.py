"""Writes a sidecar (adapter.json + adapter.safetensors). Equal input gives equal bytes and digest.

Owns the cast to the sidecar's dtype and its refusals; knows nothing of PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora_build.adapters.finite import largest
from remora_build.adapters.tensor_file import Dtype as Dtype
from remora_build.adapters.tensor_file import Tensor, write_tensors
from remora_build.staging import staged_directory
from remora_build.version import exporter_name
from remora_contract.adapter import ADAPTER_JSON, FORMAT_VERSION, WEIGHTS_FILE, Adapter, TargetRank
from remora_contract.bundle import BundleFile
from remora_contract.digests import canonical_json
from remora_contract.errors import AdapterInvalid
from remora_contract.targets import AdapterTarget

# What rounds to infinity.
_LIMIT: dict[Dtype, float] = {"float16": 65520.0, "float32": float("inf")}


@dataclass(frozen=True)
class Factor:
    """One target's part in float32: y = scale * (x W + (x @ a) @ b) + base bias + bias.

    a [k, r], b [r, n] with the scaling in it; of experts a [E, k, r], b [E, r, n]. `scale` [n] is
    DoRA's, `bias` [n] what is added to the base's.
    """

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    scaling: float
    scale: NDArray[np.float32] | None = None
    bias: NDArray[np.float32] | None = None

    @property
    def rank(self) -> int:
        return int(self.a.shape[-1])


def write_adapter(
    out: Path,
    factors: Mapping[AdapterTarget, Factor],
    *,
    base_digest: str,
    dtype: Dtype,
    source_config: Mapping[str, Any],
    invocation_tokens: tuple[int, ...] = (),
    replace: bool = False,
) -> Adapter:
    """Writes OUT whole or not at all and returns its document.

    Raises AdapterInvalid for a value that is not finite in `dtype`, Conflict when OUT exists and
    `replace` is not given, Exhausted when the disk is full.
    """
    with staged_directory(out, marker=ADAPTER_JSON, replace=replace) as staging:
        weights = staging / WEIGHTS_FILE
        digest = write_tensors(weights, cast_factors(factors, dtype))
        document = Adapter(
            format_version=FORMAT_VERSION,
            base_digest=base_digest,
            dtype=dtype,
            targets=target_ranks(factors),
            files=(BundleFile(WEIGHTS_FILE, weights.stat().st_size, digest),),
            source_config=dict(source_config),
            exporter=exporter_name(),
            invocation_tokens=invocation_tokens,
        )
        (staging / ADAPTER_JSON).write_bytes(canonical_json(document))
    return document


def target_ranks(factors: Mapping[AdapterTarget, Factor]) -> tuple[TargetRank, ...]:
    """What the document says of each target."""
    return tuple(
        TargetRank(
            t.layer, t.projection, f.rank, f.scaling, f.scale is not None, f.bias is not None
        )
        for t, f in sorted(factors.items())
    )


def cast_factors(factors: Mapping[AdapterTarget, Factor], dtype: Dtype) -> dict[str, Tensor]:
    """Sidecar tensor name -> factors in `dtype`, the vectors in float32, which are few numbers.
    Making the values raises AdapterInvalid."""
    tensors: dict[str, Tensor] = {}
    for target, factor in sorted(factors.items()):
        if factor.rank:
            tensors[target.tensor_a()] = _tensor(factor.a, dtype, target.tensor_a())
            tensors[target.tensor_b()] = _tensor(factor.b, dtype, target.tensor_b())
        for name, vector in (
            (target.tensor_scale(), factor.scale),
            (target.tensor_bias(), factor.bias),
        ):
            if vector is not None:
                tensors[name] = _tensor(vector, "float32", name)
    return tensors


def _tensor(values: NDArray[np.float32], dtype: Dtype, name: str) -> Tensor:
    return Tensor(dtype, values.shape, partial(_cast, values, dtype, name))


def _cast(values: NDArray[np.float32], dtype: Dtype, name: str) -> NDArray[np.floating]:
    reached = largest(values)
    if reached < _LIMIT[dtype]:
        return np.ascontiguousarray(values, dtype)
    if not np.isfinite(reached):
        raise AdapterInvalid(f"{name} holds NaN or infinity; it would spoil every row of a batch")
    raise AdapterInvalid(
        f"{name} reaches {reached:.3g}, more than {dtype} holds; convert with --dtype float32"
    )
