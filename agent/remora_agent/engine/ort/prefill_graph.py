"""The built model -> one for prompts: every layer's MatMulNBits becomes DynamicQuantizeMatMul.

    y = q(x) W8 + bias      q: the chunk's activations as uint8 with one scale and zero point
                            W8: the same weight as 8 bits with one scale a column

The head, which sees one position a chunk, the norms, the attention and the adapters' branches,
which read the float activations, stay as they are, in the file of the decoding model. With 128 rows
8-bit products are faster than 4-bit ones, several times so where a processor has instructions for
them; with one row they are slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

from remora_agent.engine.ort.column_weights import BlockWeight, by_column
from remora_contract.errors import EngineFault

MICROSOFT = "com.microsoft"
_PRODUCT = "DynamicQuantizeMatMul"
_OF_LAYERS = "layers."
_ALIGNMENT = 64
_LOG_ERRORS = 3
_PACKING = "packing.onnx"
_UNPACKED = "unpacked.data"
_ELEMENT = {TensorProto.INT8: np.int8, TensorProto.UINT8: np.uint8, TensorProto.FLOAT: np.float32}


@dataclass(frozen=True)
class PrefillFiles:
    """Beside `model` in the engine's folder."""

    model: str
    graph: str
    data: str


def write_prefill(folder: Path, files: PrefillFiles, scratch: Path, signed: bool) -> None:
    """Writes graph and data of the prompts' model. Raises EngineFault when a weight has a form that
    is not known or the runtime refuses the products."""
    proto = onnx.load(folder / files.model, load_external_data=False)
    nodes = [n for n in proto.graph.node if _is_replaced(n)]
    if not nodes:
        raise EngineFault("the model has no 4-bit or 8-bit products to replace")
    reader = _Initializers(proto, folder)
    with (scratch / _UNPACKED).open("wb") as data:
        writer = _Writer(data, signed)
        for node in nodes:
            writer.add(node, reader)
    packed = _pack(writer, scratch, folder / files.data)
    (scratch / _UNPACKED).unlink()
    _replace(proto, writer.products, packed)
    (folder / files.graph).write_bytes(proto.SerializeToString())


def _is_replaced(node: onnx.NodeProto) -> bool:
    return bool(node.op_type == "MatMulNBits" and node.name.startswith(_OF_LAYERS))


class _Initializers:
    """Of a model whose weights lie in a file, mapped and not read."""

    def __init__(self, proto: onnx.ModelProto, folder: Path) -> None:
        self._folder = folder
        self._by_name = {t.name: t for t in proto.graph.initializer}

    def read(self, name: str) -> NDArray[Any]:
        tensor = self._by_name[name]
        if tensor.data_location != TensorProto.EXTERNAL:
            return np.asarray(onnx.numpy_helper.to_array(tensor))
        where = {e.key: e.value for e in tensor.external_data}
        return np.memmap(
            self._folder / where["location"],
            dtype=_ELEMENT[tensor.data_type],
            mode="r",
            offset=int(where["offset"]),
            shape=tuple(tensor.dims),
        )

    def weight(self, node: onnx.NodeProto) -> BlockWeight:
        """Raises EngineFault for a form that is not known."""
        facts = {a.name: a.i for a in node.attribute}
        has = [bool(name) for name in node.input]
        if facts.get("bits") not in (4, 8) or any(has[4:5]) or any(has[6:]):
            raise EngineFault(f"node {node.name!r}: not a weight that prompts can use as 8 bits")
        zeros = self.read(node.input[3]) if len(has) > 3 and has[3] else None
        codes, scales = self.read(node.input[1]), self.read(node.input[2])
        return BlockWeight(codes, scales, zeros, facts["bits"], facts["block_size"], facts["K"])


class _Writer:
    """Appends weights to a file and keeps how each product reads them."""

    def __init__(self, data: Any, signed: bool) -> None:
        self._data, self._signed = data, signed
        self.tensors: list[onnx.TensorProto] = []
        self.products: dict[str, onnx.NodeProto] = {}  # by the name of the node they replace

    def add(self, node: onnx.NodeProto, reader: _Initializers) -> None:
        codes, scale = by_column(reader.weight(node), self._signed)
        names = [f"{node.name}.{part}" for part in ("column", "column_scale", "column_zero")]
        zero = np.full(len(scale), 0 if self._signed else 128, codes.dtype)
        for name, array in zip(names, (codes, scale, zero), strict=True):
            self._put(name, array)
        bias = node.input[5] if len(node.input) > 5 else ""
        inputs = [node.input[0], *names, *([bias] if bias else [])]
        self.products[node.name] = helper.make_node(
            _PRODUCT, inputs, list(node.output), name=node.name, domain=MICROSOFT
        )

    def _put(self, name: str, array: NDArray[Any]) -> None:
        self._data.write(bytes(-self._data.tell() % _ALIGNMENT))
        tensor = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=array.shape,
            data_location=TensorProto.EXTERNAL,
        )
        where = {"location": _UNPACKED, "offset": self._data.tell(), "length": array.nbytes}
        for key, value in where.items():
            tensor.external_data.add(key=key, value=str(value))
        self._data.write(np.ascontiguousarray(array).tobytes())
        self.tensors.append(tensor)


def _pack(writer: _Writer, scratch: Path, data: Path) -> dict[str, onnx.TensorProto]:
    """The weights by name, as the runtime saves them: prepacked where it can. The model saved has
    nothing but the products, so that no other weight is copied."""
    model = scratch / _PACKING
    model.write_bytes(_products_alone(writer).SerializeToString())
    saved = data.parent / _PACKING
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_ERRORS
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.optimized_model_filepath = str(saved)
    for key, value in (
        ("session.optimized_model_external_initializers_file_name", data.name),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "1024"),
        ("session.save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(key, value)
    try:
        ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # the runtime's exceptions share no base class
        raise EngineFault(f"onnxruntime {ort.__version__} refuses 8-bit products: {e}") from e
    proto = onnx.load(saved, load_external_data=False)
    saved.unlink()
    return {t.name: t for t in proto.graph.initializer}


def _products_alone(writer: _Writer) -> onnx.ModelProto:
    nodes, inputs, outputs = [], [], []
    for i, product in enumerate(writer.products.values()):
        node = helper.make_node(
            _PRODUCT, [f"x.{i}", *product.input[1:4]], [f"y.{i}"], domain=MICROSOFT
        )
        nodes.append(node)
        inputs.append(helper.make_tensor_value_info(f"x.{i}", TensorProto.FLOAT, None))
        outputs.append(helper.make_tensor_value_info(f"y.{i}", TensorProto.FLOAT, None))
    graph = helper.make_graph(nodes, "products", inputs, outputs, writer.tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _replace(
    proto: onnx.ModelProto,
    products: dict[str, onnx.NodeProto],
    packed: dict[str, onnx.TensorProto],
) -> None:
    graph = proto.graph
    nodes = [products.get(n.name, n) for n in graph.node]
    needed = set(_inputs(nodes))
    kept = [t for t in (*graph.initializer, *packed.values()) if t.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)


def _inputs(nodes: list[onnx.NodeProto]) -> Iterator[str]:
    for node in nodes:
        yield from node.input
