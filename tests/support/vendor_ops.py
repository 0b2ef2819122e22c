"""Stand-ins for TensorRT's and Edge-LLM's operators, so that onnx.reference can run graphs that
have them. Their arithmetic is that of the operators' documentation; how the plugins pack a weight
is not known and not needed: here it is plain int8.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun


def _by_block(values: np.ndarray, block: int) -> np.ndarray:
    return values.reshape(*values.shape[:-1], -1, block)


class TRT_FP4DynamicQuantize(OpRun):
    op_domain = "trt"

    def _run(self, x: Any, level: Any, axis: int, block_size: int) -> Any:
        blocks = _by_block(x.astype(np.float32), block_size)
        most = np.abs(blocks).max(-1, keepdims=True) / 6
        scale = (most / level).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        safe = np.where(scale == 0, 1, scale * level)
        codes = (blocks / safe).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
        return codes.reshape(x.shape).astype(np.float32), scale[..., 0].astype(np.float32)


class DequantizeLinear(OpRun):
    op_domain = "trt"

    def _run(self, x: Any, scale: Any, axis: int = 1, block_size: int = 0, **rest: Any) -> Any:
        wide = np.repeat(scale, block_size, -1) if block_size else scale
        return ((x.astype(np.float32) * wide).astype(np.float32),)


class TRT_MXFP8DynamicQuantize(OpRun):
    op_domain = "trt"

    def _run(self, x: Any, axis: int, block_size: int) -> Any:
        blocks = _by_block(x.astype(np.float32), block_size)
        most = np.maximum(np.abs(blocks).max(-1, keepdims=True), 1e-20)
        exponent = np.ceil(np.log2(most / 448))
        codes = (blocks / 2**exponent).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        return codes.reshape(x.shape), (exponent[..., 0] + 127).astype(np.uint8)


class TRT_MXFP8DequantizeLinear(OpRun):
    op_domain = "trt"

    def _run(self, x: Any, exponents: Any, axis: int, block_size: int) -> Any:
        scale = 2.0 ** (exponents.astype(np.float32) - 127)
        return ((x.astype(np.float32) * np.repeat(scale, block_size, -1)).astype(np.float32),)


class Int4GroupwiseGemmPluginV2(OpRun):
    op_domain = "trt_edgellm"

    def _run(self, x: Any, w: Any, scale: Any, gemm_k: int, gemm_n: int, group_size: int) -> Any:
        return ((x @ (w.reshape(gemm_k, gemm_n).astype(np.float32) * scale)).astype(x.dtype),)


class Nvfp4A16GemmPlugin(Int4GroupwiseGemmPluginV2):
    op_domain = "trt_edgellm"


OPERATORS = [
    TRT_FP4DynamicQuantize,
    DequantizeLinear,
    TRT_MXFP8DynamicQuantize,
    TRT_MXFP8DequantizeLinear,
    Int4GroupwiseGemmPluginV2,
    Nvfp4A16GemmPlugin,
]


def reference_answers(
    model: onnx.ModelProto, tokens: np.ndarray, feed: dict[str, np.ndarray]
) -> np.ndarray:
    """Logits by onnx.reference: slow, and knows every type."""
    inputs = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), **feed}
    return ReferenceEvaluator(model, new_ops=OPERATORS).run(["logits"], inputs)[0]
