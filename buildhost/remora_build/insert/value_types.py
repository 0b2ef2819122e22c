"""Element types and shapes of a graph's values: declared by the model, else inferred by ONNX.

Inference sees a stand-in for the model: large initializers are references, so no weight is copied,
and operators that ONNX does not know are replaced by standard ones that give the same shape.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from remora_build.insert.patterns import packed_sizes
from remora_build.insert.view import (
    Dim,
    Shape,
    TensorType,
    attribute,
    is_dequantize,
    is_quantize,
)
from remora_contract.errors import InvalidInput

_MOST_INLINE_BYTES = 1024  # a shape or an axis; inference reads it
_EXTERNAL = 1
# Not of ONNX, and their first output has the shape and type of their first input.
_SHAPELESS = (
    "SimplifiedLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "RotaryEmbedding",
    "QuickGelu",
    "FastGelu",
    "BiasGelu",
)


def value_types(proto: Any) -> dict[str, TensorType]:
    """Tensor types by value name. Raises InvalidInput when the model contradicts itself."""
    import onnx

    try:
        inferred = onnx.shape_inference.infer_shapes(_stand_in(proto), data_prop=True).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as e:
        text = " ".join(str(e).split())[:300]
        raise InvalidInput(f"the model's shapes do not fit together: {text}") from e
    infos = [*inferred.value_info, *inferred.input, *inferred.output]
    types = ((info.name, _tensor_type(info.type)) for info in infos)
    return {name: found for name, found in types if found is not None}


def _stand_in(proto: Any) -> Any:
    import onnx

    light = onnx.ModelProto()
    light.ir_version = proto.ir_version
    light.opset_import.extend(proto.opset_import)
    light.functions.extend(proto.functions)
    graph = light.graph
    graph.name = proto.graph.name
    for field in ("input", "output", "value_info"):
        getattr(graph, field).extend(getattr(proto.graph, field))
    for tensor in proto.graph.initializer:
        if len(tensor.raw_data) <= _MOST_INLINE_BYTES:
            graph.initializer.append(tensor)
        else:
            _add_reference(graph, tensor.name, tensor.dims, tensor.data_type)
    own = {(f.domain, f.name) for f in proto.functions}
    for node in proto.graph.node:
        known = not node.domain and node.op_type not in _SHAPELESS[:3]
        if known or (node.domain, node.op_type) in own:
            graph.node.append(node)
        else:
            _add_standard(graph, node)
    return light


def _add_reference(graph: Any, name: str, dims: Iterable[int], dtype: int) -> None:
    graph.initializer.add(name=name, dims=dims, data_type=dtype, data_location=_EXTERNAL)


def _add_standard(graph: Any, node: Any) -> None:
    """A standard node that gives the first output its shape; the node itself where none does."""
    sizes = packed_sizes(node)
    if not node.input or not node.output:
        return
    if sizes is not None:
        weight = f"{node.output[0]}.weight"
        _add_reference(graph, weight, sizes, 1)
        graph.node.add(op_type="MatMul", input=[node.input[0], weight], output=node.output[:1])
    elif node.op_type == "FusedMatMul" and not _moves_batch(node):
        left, right = (attribute(node, name) for name in ("transA", "transB"))
        equation = f"...{'ji' if left else 'ij'},...{'kj' if right else 'jk'}->...ik"
        product = graph.node.add(op_type="Einsum", input=node.input, output=node.output)
        product.attribute.add(name="equation", type=3, s=equation.encode())
    elif node.op_type in _SHAPELESS or is_quantize(node) or is_dequantize(node):
        graph.node.add(op_type="Identity", input=node.input[:1], output=node.output[:1])
    else:
        graph.node.append(node)


def _moves_batch(node: Any) -> bool:
    return bool(attribute(node, "transBatchA") or attribute(node, "transBatchB"))


def _tensor_type(type_proto: Any) -> TensorType | None:
    if not type_proto.HasField("tensor_type"):
        return None
    tensor = type_proto.tensor_type
    if not tensor.HasField("shape"):
        return TensorType(tensor.elem_type, None)
    shape: Shape = tuple(_dim(d) for d in tensor.shape.dim)
    return TensorType(tensor.elem_type, shape)


def _dim(dim: Any) -> Dim:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    return str(dim.dim_param) or None
