"""A matrix of the graph as nodes: dequantized where it is stored as codes, its input prepared where
the quantization asks for it. Owns which nodes a form becomes; `forms` says what it is made of.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from remora_build.graph import forms
from remora_build.graph.forms import Forms, MatrixForm, StoredDtype
from remora_build.graph.nodes import IR_DTYPE, Nodes
from remora_contract.bundle import GraphSpec

_ROUNDED: dict[str, StoredDtype] = {"int8": "int8", "fp8": "float8e4m3"}


class MatrixWeights:
    """`weight` is an initializer's name, `at` the stem of the nodes' names."""

    def __init__(self, nodes: Nodes, graph: GraphSpec, own: Forms | None = None) -> None:
        self._nodes = nodes
        self._dtype = graph.dtype
        self._forms = own or Forms(graph.quant)

    def product(self, weight: str, at: str, x: ir.Value, *, rank: int = 3) -> ir.Value:
        """x [..., k] of `rank` dimensions times the matrix [k, n]."""
        form, nodes = self._forms.of(weight), self._nodes
        prepared = self._prepared(weight, at, x, form)
        y = nodes.add("MatMul", f"{at}.matmul", [prepared, self._value(weight, at, form)])
        if not form.offsets:
            return y
        sums = self._block_sums(weight, at, prepared, form, rank)
        extra = nodes.add("MatMul", f"{at}.offset", [sums, nodes.weight(forms.offsets(weight))])
        return nodes.add("Add", f"{at}.offset_add", [y, extra])

    def branch_input(self, weight: str, at: str, x: ir.Value) -> ir.Value:
        """What the adapter branch reads: the activation as it was before any smoothing."""
        if not self._forms.of(weight).branch_in:
            return x
        scale = self._nodes.weight(forms.branch_in(weight))
        return self._nodes.add("Mul", f"{at}.branch_in", [x, scale])

    def branch_output(self, weight: str, at: str, y: ir.Value) -> ir.Value:
        """What the adapter branch adds."""
        if not self._forms.of(weight).branch_out:
            return y
        scale = self._nodes.weight(forms.branch_out(weight))
        return self._nodes.add("Mul", f"{at}.branch_out", [y, scale])

    def _prepared(self, weight: str, at: str, x: ir.Value, form: MatrixForm) -> ir.Value:
        nodes = self._nodes
        if form.prescaled:
            x = nodes.add("Mul", f"{at}.prescale", [x, nodes.weight(forms.prescale(weight))])
        if form.activations == "none":
            return x
        scale = nodes.weight(forms.input_scale(weight))
        zero = nodes.number(0, _ROUNDED[form.activations])
        rounded = nodes.add("QuantizeLinear", f"{at}.quantize_input", [x, scale, zero])
        return nodes.add("DequantizeLinear", f"{at}.dequantize_input", [rounded, scale, zero])

    def _value(self, weight: str, at: str, form: MatrixForm) -> ir.Value:
        """[k, n] in the graph's dtype."""
        nodes = self._nodes
        if form.kind == "plain":
            return nodes.weight(weight)
        codes, scale = nodes.weight(forms.codes(weight)), nodes.weight(forms.scales(weight))
        if form.kind == "nvfp4":
            whole = nodes.weight(forms.global_scale(weight))
            axis = {"axis": 1} if form.global_columns else {}
            scale = nodes.add("DequantizeLinear", f"{at}.dequantize_scale", [scale, whole], axis)
        attributes: dict[str, Any] = {"axis": 1}
        if form.block is not None:
            attributes = {"axis": 0, "block_size": form.block}
        value = nodes.add("DequantizeLinear", f"{at}.dequantize", [codes, scale], attributes)
        if form.kind == "nvfp4" and self._dtype != "float32":  # its scales are float32
            value = nodes.add("Cast", f"{at}.narrow", [value], {"to": IR_DTYPE[self._dtype]})
        return value

    def _block_sums(
        self, weight: str, at: str, x: ir.Value, form: MatrixForm, rank: int
    ) -> ir.Value:
        """[..., k / block]: x summed over each block."""
        nodes = self._nodes
        count, block = nodes.weight(forms.offsets(weight)), form.block or 0
        assert count.shape is not None  # an initializer has one
        shape = nodes.integers(*[0] * (rank - 1), int(count.shape.numpy()[0]), block)
        split = nodes.add("Reshape", f"{at}.blocks", [x, shape])
        axis = nodes.integers(rank)
        return nodes.add("ReduceSum", f"{at}.block_sums", [split, axis], {"keepdims": 0})
