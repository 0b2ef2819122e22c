"""An adapter's tensors in host memory, verified: every declared target present, shaped as declared,
finite, and nothing besides. The only way adapter bytes get into an engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora_contract.adapter import WEIGHTS_FILE, Adapter, TargetRank, load_adapter
from remora_contract.bundle import Bundle, DecoderSpec
from remora_contract.compat import adapter_refusals
from remora_contract.digests import digest_bytes
from remora_contract.errors import AdapterInvalid, ArtifactInvalid, Incompatible
from remora_contract.targets import AdapterTarget, Projection

Factors = tuple[NDArray[np.floating], NDArray[np.floating]]

_MAX_HEADER_BYTES = 16 << 20
_DTYPES: dict[str, tuple[str, np.dtype[np.floating]]] = {
    "float16": ("F16", np.dtype("<f2")),
    "float32": ("F32", np.dtype("<f4")),
}


@dataclass(frozen=True)
class AdapterWeights:
    """`tensors[target] = (a [k, r], b [r, n])`, scale already in b; float16 or float32."""

    digest: str
    tensors: Mapping[AdapterTarget, Factors]

    @property
    def rank(self) -> int:
        """The most columns it takes in any projection."""
        return max(int(a.shape[1]) for a, _ in self.tensors.values())

    def rank_of(self, projection: Projection) -> int:
        """Largest rank over the layers; 0 when the projection is not adapted."""
        ranks = (
            int(a.shape[1]) for t, (a, _) in self.tensors.items() if t.projection == projection
        )
        return max(ranks, default=0)

    @property
    def bytes(self) -> int:
        return sum(a.nbytes + b.nbytes for a, b in self.tensors.values())


def load_weights(directory: Path, bundle: Bundle) -> AdapterWeights:
    """Reads a converted adapter for an engine of `bundle`, all of it checked.

    Raises Incompatible (other base, rank or layer the bundle cannot take), ArtifactInvalid (file
    missing, truncated or damaged), AdapterInvalid (a tensor missing, unknown, misshapen or not
    finite).
    """
    adapter = load_adapter(directory)
    if refusals := adapter_refusals(bundle, adapter):
        raise Incompatible(refusals)
    path = directory / WEIGHTS_FILE
    data = _read(path, adapter, bundle.decoder)
    tensors = _tensors(path, data, adapter, bundle.decoder)
    return AdapterWeights(adapter.digest, tensors)


def expected_shapes(target: TargetRank, decoder: DecoderSpec) -> dict[str, tuple[int, int]]:
    """Sidecar tensor name -> shape: A [k, r] and B [r, n] of one target."""
    k, n = decoder.in_features(target.projection), decoder.out_features(target.projection)
    return {
        target.target.tensor_a(): (k, target.rank),
        target.target.tensor_b(): (target.rank, n),
    }


def _read(path: Path, adapter: Adapter, decoder: DecoderSpec) -> bytes:
    """The weight file's bytes: no larger than its targets need, and the declared digest."""
    declared = next((f for f in adapter.files if f.path == WEIGHTS_FILE), None)
    if declared is None:
        raise ArtifactInvalid(f"{path.parent}: adapter.json does not list {WEIGHTS_FILE}")
    width = _DTYPES[adapter.dtype][1].itemsize
    shapes = (s for t in adapter.targets for s in expected_shapes(t, decoder).values())
    limit = 8 + _MAX_HEADER_BYTES + width * sum(rows * columns for rows, columns in shapes)
    try:
        size = path.stat().st_size
        if size != declared.size or size > limit:
            raise ArtifactInvalid(f"{path} has {size} bytes, not {declared.size}: truncated?")
        data = path.read_bytes()
    except OSError as e:
        raise ArtifactInvalid(f"{path} cannot be read: {e.strerror or e}") from e
    if digest_bytes(data) != declared.digest:
        raise ArtifactInvalid(f"{path} is damaged: its digest is not {declared.digest}")
    return data


def _tensors(
    path: Path, data: bytes, adapter: Adapter, decoder: DecoderSpec
) -> dict[AdapterTarget, Factors]:
    header, start = _header(path, data)
    shapes = {n: s for t in adapter.targets for n, s in expected_shapes(t, decoder).items()}
    if unbound := sorted(set(header) - set(shapes)):
        raise AdapterInvalid(f"{path}: no declared target takes tensor {unbound[0][:80]!r}")
    if missing := sorted(set(shapes) - set(header)):
        raise AdapterInvalid(f"{path}: tensor {missing[0]!r} of a declared target is missing")
    body = memoryview(data)[start:]
    arrays = {
        name: _tensor(path, body, name, header[name], shape, adapter.dtype)
        for name, shape in shapes.items()
    }
    return {
        t.target: (arrays[t.target.tensor_a()], arrays[t.target.tensor_b()])
        for t in adapter.targets
    }


def _header(path: Path, data: bytes) -> tuple[dict[str, Any], int]:
    """The safetensors header without its metadata, and where tensor bytes begin."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(_MAX_HEADER_BYTES, len(data) - 8):
        raise AdapterInvalid(f"{path}: its safetensors header is longer than the file")
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError) as e:
        raise AdapterInvalid(f"{path}: its safetensors header is not JSON: {e}") from e
    if not isinstance(header, dict):
        raise AdapterInvalid(f"{path}: its safetensors header is not a table")
    header.pop("__metadata__", None)
    return header, 8 + length


def _tensor(
    path: Path, body: memoryview, name: str, entry: object, shape: tuple[int, int], dtype: str
) -> NDArray[np.floating]:
    """A read-only view [rows, columns] into `body`, finite."""
    code, numpy_dtype = _DTYPES[dtype]
    begin, end = _span(path, name, entry, code, shape)
    if end - begin != shape[0] * shape[1] * numpy_dtype.itemsize or end > len(body):
        raise AdapterInvalid(f"{path}: the byte range of tensor {name!r} does not fit its shape")
    array: NDArray[np.floating] = np.frombuffer(body[begin:end], numpy_dtype).reshape(shape)
    if not np.isfinite(array).all():
        raise AdapterInvalid(
            f"{path}: tensor {name!r} holds NaN or infinity; it would spoil every answer. "
            "Train or convert the adapter again"
        )
    return array


def _span(
    path: Path, name: str, entry: object, code: str, shape: tuple[int, int]
) -> tuple[int, int]:
    if not isinstance(entry, dict) or entry.get("dtype") != code:
        raise AdapterInvalid(f"{path}: tensor {name!r} is not {code} as adapter.json says")
    if entry.get("shape") != list(shape):
        raise AdapterInvalid(
            f"{path}: tensor {name!r} has shape {str(entry.get('shape'))[:60]}, not {list(shape)}"
        )
    offsets = entry.get("data_offsets")
    if not (
        isinstance(offsets, list)
        and len(offsets) == 2
        and all(type(o) is int for o in offsets)
        and 0 <= offsets[0] <= offsets[1]
    ):
        raise AdapterInvalid(f"{path}: tensor {name!r} has no valid byte range")
    return offsets[0], offsets[1]
