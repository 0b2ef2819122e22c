"""An adapter's tensors in host memory, verified: every declared target present, shaped as declared,
finite, and nothing besides. The only way adapter bytes get into an engine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora_contract.adapter import WEIGHTS_FILE, Adapter, load_adapter
from remora_contract.bundle import Bundle
from remora_contract.compat import adapter_refusals
from remora_contract.decoder import DecoderSpec
from remora_contract.digests import digest_bytes
from remora_contract.errors import AdapterInvalid, ArtifactInvalid, Incompatible
from remora_contract.targets import AdapterTarget, Projection

Factors = tuple[NDArray[np.floating], NDArray[np.floating]]

_MAX_HEADER_BYTES = 16 << 20
_FLOAT32 = 4
_HALF_EXPONENT = 0x7C00  # all ones: infinity or NaN
_DTYPES: dict[str, tuple[str, np.dtype[np.floating]]] = {
    "float16": ("F16", np.dtype("<f2")),
    "float32": ("F32", np.dtype("<f4")),
}


@dataclass(frozen=True)
class Vectors:
    """What stands around a target's factors, [n] each; None: 1 and 0. float32 as read; an engine
    may prepare them in its own dtype."""

    scale: NDArray[np.floating] | None = None
    bias: NDArray[np.floating] | None = None


@dataclass(frozen=True)
class AdapterWeights:
    """`tensors[target] = (a [k, r], b [r, n])`, scale already in b; float16 or float32. Experts'
    have one of each for every expert, a [E, k, r], b [E, r, n]. `vectors` as adapter.json says.
    `prepared` is what the engine made of them ahead, known to it alone."""

    digest: str
    tensors: Mapping[AdapterTarget, Factors]
    vectors: Mapping[AdapterTarget, Vectors] = field(default_factory=dict)
    prepared: object | None = field(default=None, compare=False, repr=False)

    @property
    def rank(self) -> int:
        """The most columns it takes in any projection."""
        return max((int(a.shape[-1]) for a, _ in self.tensors.values()), default=0)

    def rank_of(self, projection: Projection) -> int:
        """Largest rank over the layers; 0 when the projection is not adapted."""
        ranks = (
            int(a.shape[-1]) for t, (a, _) in self.tensors.items() if t.projection == projection
        )
        return max(ranks, default=0)

    @property
    def dora(self) -> bool:
        """Whether it rescales outputs, so that no other adapter's part may be beside its own."""
        return any(v.scale is not None for v in self.vectors.values())

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self._arrays())

    @property
    def bank_bytes(self) -> int:
        """What it takes in an engine that computes in float32."""
        return _FLOAT32 * sum(array.size for array in self._arrays())

    def _arrays(self) -> Iterator[NDArray[np.floating]]:
        for factors in self.tensors.values():
            yield from factors
        for pair in self.vectors.values():
            yield from (v for v in (pair.scale, pair.bias) if v is not None)


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
    arrays = _arrays(path, data, expected_tensors(adapter, bundle.decoder))
    targets = [t.target for t in adapter.targets]
    factors = {
        t: (arrays[t.tensor_a()], arrays[t.tensor_b()]) for t in targets if t.tensor_a() in arrays
    }
    vectors = {
        t: Vectors(arrays.get(t.tensor_scale()), arrays.get(t.tensor_bias()))
        for t in targets
        if t.tensor_scale() in arrays or t.tensor_bias() in arrays
    }
    return AdapterWeights(adapter.digest, factors, vectors)


@dataclass(frozen=True)
class Expected:
    """A tensor that adapter.json promises."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return prod(self.shape) * _DTYPES[self.dtype][1].itemsize

    @property
    def bank_bytes(self) -> int:
        return prod(self.shape) * _FLOAT32


def expected_tensors(adapter: Adapter, decoder: DecoderSpec) -> dict[str, Expected]:
    """Sidecar tensor name -> what it must be."""
    found: dict[str, Expected] = {}
    for t in adapter.targets:
        k, n = decoder.in_features(t.projection), decoder.out_features(t.projection)
        copies = (decoder.copies(t.projection),) if t.projection.startswith("expert_") else ()
        if t.rank:
            found[t.target.tensor_a()] = Expected((*copies, k, t.rank), adapter.dtype)
            found[t.target.tensor_b()] = Expected((*copies, t.rank, n), adapter.dtype)
        if t.dora:
            found[t.target.tensor_scale()] = Expected((n,), "float32")
        if t.bias:
            found[t.target.tensor_bias()] = Expected((n,), "float32")
    return found


def bank_bytes(adapter: Adapter, decoder: DecoderSpec) -> int:
    """`AdapterWeights.bank_bytes` before the weights are read."""
    return sum(e.bank_bytes for e in expected_tensors(adapter, decoder).values())


def _read(path: Path, adapter: Adapter, decoder: DecoderSpec) -> memoryview:
    """The weight file's bytes: no larger than its targets need, and the declared digest."""
    declared = next((f for f in adapter.files if f.path == WEIGHTS_FILE), None)
    if declared is None:
        raise ArtifactInvalid(f"{path.parent}: adapter.json does not list {WEIGHTS_FILE}")
    promised = expected_tensors(adapter, decoder).values()
    limit = 8 + _MAX_HEADER_BYTES + sum(e.bytes for e in promised)
    try:
        with open(path, "rb", buffering=0, opener=_open_at_once) as file:
            size = os.fstat(file.fileno()).st_size
            if size != declared.size or size > limit:
                raise ArtifactInvalid(f"{path} has {size} bytes, not {declared.size}: truncated?")
            data = _filled(file, size)
    except OSError as e:
        raise ArtifactInvalid(f"{path} cannot be read: {e.strerror or e}") from e
    if digest_bytes(data) != declared.digest:
        raise ArtifactInvalid(f"{path} is damaged: its digest is not {declared.digest}")
    return data


def _open_at_once(path: str, flags: int) -> int:
    """Opening a pipe would wait for somebody to write to it; its size then says what it is not."""
    return os.open(path, flags | os.O_NONBLOCK)


def _filled(file: FileIO, size: int) -> memoryview:
    """`size` bytes of it, or what there are. In an array of numpy's, which asks the system for huge
    pages: those of a new bytes object take longer to come by than the file to read."""
    memory = np.empty(size, np.uint8)
    view, at = memory.data, 0
    while read := file.readinto(view[at:]):
        at += read
    return view[:at].toreadonly()


def _arrays(
    path: Path, data: memoryview, promised: Mapping[str, Expected]
) -> dict[str, NDArray[Any]]:
    header, start = _header(path, data)
    if unbound := sorted(set(header) - set(promised)):
        raise AdapterInvalid(f"{path}: no declared target takes tensor {unbound[0][:80]!r}")
    if missing := sorted(set(promised) - set(header)):
        raise AdapterInvalid(f"{path}: tensor {missing[0]!r} of a declared target is missing")
    body = data[start:]
    return {name: _tensor(path, body, name, header[name], e) for name, e in promised.items()}


def _header(path: Path, data: memoryview) -> tuple[dict[str, Any], int]:
    """The safetensors header without its metadata, and where tensor bytes begin."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(_MAX_HEADER_BYTES, len(data) - 8):
        raise AdapterInvalid(f"{path}: its safetensors header is longer than the file")
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
    except (ValueError, RecursionError) as e:
        raise AdapterInvalid(f"{path}: its safetensors header is not JSON: {e}") from e
    if not isinstance(header, dict):
        raise AdapterInvalid(f"{path}: its safetensors header is not a table")
    header.pop("__metadata__", None)
    return header, 8 + length


def _tensor(
    path: Path, body: memoryview, name: str, entry: object, expected: Expected
) -> NDArray[Any]:
    """A read-only view into `body`, finite."""
    code, numpy_dtype = _DTYPES[expected.dtype]
    begin, end = _span(path, name, entry, code, expected.shape)
    if end - begin != expected.bytes or end > len(body):
        raise AdapterInvalid(f"{path}: the byte range of tensor {name!r} does not fit its shape")
    array: NDArray[Any] = np.frombuffer(body[begin:end], numpy_dtype).reshape(expected.shape)
    if not _is_finite(array):
        raise AdapterInvalid(
            f"{path}: tensor {name!r} holds NaN or infinity; it would spoil every answer. "
            "Train or convert the adapter again"
        )
    return array


def _is_finite(array: NDArray[np.floating]) -> bool:
    """float16 by its exponent bits: numpy's own test takes eight times as long."""
    if array.dtype == np.float16:
        return bool((array.view(np.uint16) & _HALF_EXPONENT).max(initial=0) < _HALF_EXPONENT)
    return bool(np.isfinite(array).all())


def _span(
    path: Path, name: str, entry: object, code: str, shape: tuple[int, ...]
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
