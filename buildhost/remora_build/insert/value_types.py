"""Element types and shapes of a graph's values: declared by the model, else inferred by ONNX.

Inference sees the structure only: large initializers are replaced by references, so no weight is
copied.
"""

from __future__ import annotations

from typing import Any

from remora_build.insert.view import Dim, Shape, TensorType
from remora_contract.errors import InvalidInput

_MOST_INLINE_BYTES = 1024  # a shape or an axis; inference reads it
_EXTERNAL = 1


def value_types(proto: Any) -> dict[str, TensorType]:
    """Tensor types by value name. Raises InvalidInput when the model contradicts itself."""
    import onnx

    light = _without_weights(proto)
    try:
        inferred = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as e:
        raise InvalidInput(f"the model's shapes do not fit together: {str(e)[:300]}") from e
    infos = [*inferred.value_info, *inferred.input, *inferred.output]
    types = ((info.name, _tensor_type(info.type)) for info in infos)
    return {name: found for name, found in types if found is not None}


def _without_weights(proto: Any) -> Any:
    """A copy of the model whose large inline initializers are references to nothing."""
    import onnx

    light = onnx.ModelProto()
    light.ir_version = proto.ir_version
    light.opset_import.extend(proto.opset_import)
    light.functions.extend(proto.functions)
    graph = light.graph
    graph.name = proto.graph.name
    for field in ("node", "input", "output", "value_info"):
        getattr(graph, field).extend(getattr(proto.graph, field))
    for tensor in proto.graph.initializer:
        if len(tensor.raw_data) <= _MOST_INLINE_BYTES:
            graph.initializer.append(tensor)
            continue
        graph.initializer.add(
            name=tensor.name, dims=tensor.dims, data_type=tensor.data_type, data_location=_EXTERNAL
        )
    return light


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
