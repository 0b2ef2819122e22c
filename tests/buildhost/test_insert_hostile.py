"""A model from anyone: sizes are bounded before memory is taken, paths stay below the model's
directory, and damage is told in one line."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from remora_build.insert import bounds
from remora_build.insert.bounds import check_structure
from remora_build.insert.source import read_model
from remora_contract.errors import InvalidInput


def tiny_model() -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    values = [helper.make_tensor_value_info(n, 1, ["b", 64]) for n in ("x", "y")]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return helper.make_model(helper.make_graph([node], "g", values[:1], values[1:], [weight]))


def external(directory: Path, **changes: str) -> Path:
    model = tiny_model()
    tensor = model.graph.initializer[0]
    (directory / "w.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    fields = {"location": "w.bin", "offset": "0", "length": "16384"} | changes
    for key, value in fields.items():
        tensor.external_data.add(key=key, value=value)
    (directory / "model.onnx").write_bytes(model.SerializeToString())
    return directory / "model.onnx"


def test_external_data_is_found_beside_the_model(tmp_path: Path) -> None:
    assert read_model(external(tmp_path)).data_files == {"w.bin": 16384}


@pytest.mark.parametrize(
    "location", ["../w.bin", "/etc/passwd", "a/../../w.bin", "", ".", "a\\w.bin", "w.bin\0.txt"]
)
def test_external_data_outside_the_directory_is_refused(location: str, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "w.bin").write_bytes(bytes(16384))
    with pytest.raises(InvalidInput, match="'w' lies in"):
        read_model(external(inner, location=location))


def test_external_data_behind_a_linked_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "w.bin").write_bytes(bytes(16384))
    (tmp_path / "inner" / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(InvalidInput, match="no file beside the model"):
        read_model(external(tmp_path / "inner", location="link/w.bin"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": "16385"}, "ends at byte 16385 of w.bin, which has 16384"),
        ({"offset": "16384"}, "truncated or another model's"),
        ({"offset": "-1"}, "offset '-1'.* is no number"),
        ({"length": "9" * 30}, "is no number"),
        ({"location": "absent.bin"}, "no file beside the model"),
    ],
)
def test_external_data_that_is_not_there_is_named(
    changes: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_model(external(tmp_path, **changes))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    import os

    path = external(tmp_path, location="pipe")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidInput, match="no file beside the model"):
        read_model(path)


def field(number: int, data: bytes) -> bytes:
    size, varint = len(data), b""
    while size >= 0x80:
        varint += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([number << 3 | 2]) + varint + bytes([size]) + data


def test_a_file_of_empty_nodes_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    """2 bytes a node in the file, hundreds in memory."""
    nodes = field(1, b"") * 600_000
    (tmp_path / "model.onnx").write_bytes(field(7, nodes))
    began = time.monotonic()
    with pytest.raises(InvalidInput, match="more than 524288 fields"):
        read_model(tmp_path / "model.onnx")
    assert time.monotonic() - began < 20


def test_structure_is_bounded_and_raw_weights_are_not_structure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bounds, "MAX_STRUCTURE_BYTES", 4096)
    model = tiny_model()
    check_structure(memoryview(model.SerializeToString()), "m")  # 16 KiB of raw data
    model.graph.node[0].doc_string = "x" * 5000
    with pytest.raises(InvalidInput, match=r"beside the raw data.*external data"):
        check_structure(memoryview(model.SerializeToString()), "m")


@pytest.mark.parametrize("keep", [1, 40, 1000, 16000])
def test_a_truncated_model_is_no_model(keep: int, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(tiny_model().SerializeToString()[:keep])
    with pytest.raises(InvalidInput, match="no ONNX model"):
        read_model(tmp_path / "model.onnx")


@pytest.mark.parametrize("junk", [b"\xff" * 64, b"\x3a\xff\xff\xff\xff\x0f", b"\x0b\x00", b"{}"])
def test_bytes_that_are_no_protobuf_are_no_model(junk: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(junk)
    with pytest.raises(InvalidInput, match="no ONNX model"):
        read_model(tmp_path / "model.onnx")


def test_an_empty_file_and_an_empty_graph_are_no_model(tmp_path: Path) -> None:
    for content in (b"", onnx.ModelProto(ir_version=8).SerializeToString()):
        (tmp_path / "model.onnx").write_bytes(content)
        with pytest.raises(InvalidInput, match=r"1 to 2147483647|no ONNX model"):
            read_model(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"nodename", "the name of a node is no UTF-8"),
        (b"MatMul", "the op_type of a node is no UTF-8"),
        (b"weights", "the (name of a tensor|input of a node) is no UTF-8"),
        (b"hidden", "the (name of a valueinfo|input of a node) is no UTF-8"),
        (b"dimension", "the dim_param of a dimension is no UTF-8"),
        (b"key", "the key of a stringstringentry is no UTF-8"),
    ],
)
def test_names_that_are_no_text_are_refused(text: bytes, message: str, tmp_path: Path) -> None:
    """Protobuf gives them as bytes, and whoever looks for a letter in them gets a TypeError."""
    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "weights")
    values = [
        helper.make_tensor_value_info(n, 1, ["dimension", 64]) for n in ("hidden", "answered")
    ]
    node = helper.make_node("MatMul", ["hidden", "weights"], ["answered"], name="nodename")
    node.metadata_props.add(key="key", value="value")
    model = helper.make_model(helper.make_graph([node], "g", values[:1], values[1:], [weight]))
    data = model.SerializeToString().replace(text, b"\xff" + text[1:])
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(InvalidInput, match=message):
        read_model(tmp_path / "model.onnx")
