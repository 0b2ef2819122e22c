"""Reads an ONNX model that may come from anyone: structure bounded, external data located, checked.

    MODEL.onnx         graph, and weights up to protobuf's 2 GB
    its external data  beside it; never read here, only copied later

Owns files and what a reference may name; knows nothing of projections.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remora_build.insert.bounds import MAX_MODEL_BYTES, check_structure
from remora_build.insert.legible import check_text
from remora_contract.bundle import check_relative
from remora_contract.errors import DocumentInvalid, InvalidInput, NotFound

_MAX_DATA_FILES = 1 << 16
_MAX_DEPTH = 32  # of subgraphs
_EXTERNAL = 1  # TensorProto.EXTERNAL


@dataclass(frozen=True)
class SourceModel:
    """`proto` is an onnx.ModelProto whose external tensors are references still."""

    path: Path
    proto: Any
    data_files: dict[str, int]  # location as the model writes it -> bytes

    def data_path(self, location: str) -> Path:
        return self.path.parent / location


def read_model(path: Path) -> SourceModel:
    """Raises NotFound, and InvalidInput for what is no ONNX model, is larger than can be held or
    refers to data that is not there or not its own."""
    proto = _parse(path)
    return SourceModel(path, proto, _data_files(proto, path))


def _parse(path: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        if not path.is_file():
            raise NotFound(f"{path} is no file; name the ONNX model itself")
        size = path.stat().st_size
        if not 0 < size <= MAX_MODEL_BYTES:
            raise InvalidInput(f"{path}: {size} bytes; a model has 1 to {MAX_MODEL_BYTES}")
        data = path.read_bytes()
        check_structure(memoryview(data), str(path))
        proto = onnx.ModelProto()
        proto.ParseFromString(data)
    except OSError as e:
        raise InvalidInput(f"{path} cannot be read: {e.strerror or e}") from e
    except DecodeError as e:
        raise InvalidInput(f"{path} is no ONNX model: {e}") from e
    if not proto.graph.node:
        raise InvalidInput(f"{path} is no ONNX model: its graph has no nodes")
    check_text(proto, str(path))
    return proto


def all_tensors(graph: Any, depth: int = 0) -> Iterator[Any]:
    """Every TensorProto of a graph: initializers and attributes, subgraphs included."""
    if depth > _MAX_DEPTH:
        raise InvalidInput(f"subgraphs are nested deeper than {_MAX_DEPTH}")
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from _attribute_tensors(attribute, depth)


def _attribute_tensors(attribute: Any, depth: int) -> Iterator[Any]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    for graph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
        yield from all_tensors(graph, depth + 1)


def _model_tensors(proto: Any) -> Iterator[Any]:
    yield from all_tensors(proto.graph)
    for function in proto.functions:
        for node in function.node:
            for attribute in node.attribute:
                yield from _attribute_tensors(attribute, 1)


def _data_files(proto: Any, path: Path) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for tensor in _model_tensors(proto):
        if tensor.data_location != _EXTERNAL:
            continue
        reference = {entry.key: entry.value for entry in tensor.external_data}
        where = f"{path}: tensor {tensor.name[:120]!r}"
        location = reference.get("location", "")
        if location not in sizes:
            if len(sizes) == _MAX_DATA_FILES:
                raise InvalidInput(f"{path} refers to more than {_MAX_DATA_FILES} data files")
            sizes[location] = _data_size(path, location, where)
        end = _natural(reference, "offset", where) + _natural(reference, "length", where)
        if end > sizes[location]:
            raise InvalidInput(
                f"{where} ends at byte {end} of {location}, which has {sizes[location]}: "
                "the data file is truncated or another model's"
            )
    return sizes


def _data_size(path: Path, location: str, where: str) -> int:
    """Bytes of a data file, which is named relative to the model and lies below its directory; the
    file itself may be a symbolic link, as in the Hugging Face cache."""
    try:
        check_relative(location)
    except DocumentInvalid as e:
        raise InvalidInput(
            f"{where} lies in {location[:200]!r}, which is no path below the model's directory"
        ) from e
    directory, file = path.parent.resolve(), path.parent / location
    try:
        inside = file.parent.resolve().is_relative_to(directory)
        if not inside or not file.is_file():
            raise InvalidInput(f"{where} lies in {location[:200]!r}, no file beside the model")
        return file.stat().st_size
    except OSError as e:
        raise InvalidInput(f"{where}: {location[:200]!r}: {e.strerror or e}") from e


def _natural(reference: dict[str, str], key: str, where: str) -> int:
    text = reference.get(key, "0")
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise InvalidInput(f"{where}: {key} {text[:40]!r} of its external data is no number")
    return int(text)
