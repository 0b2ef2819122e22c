"""How a graph stores its weights: a part of bundle.json, and what it asks of a device. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from remora_contract.targets import is_matrix

QuantKind = Literal["none", "int4", "int8", "fp8", "mxfp8", "nvfp4"]
_MAX_BLOCK = 1 << 20
# Formats whose block is part of their definition.
_FIXED_BLOCKS = {"none": None, "mxfp8": 32, "nvfp4": 16}
_ROUNDED_INPUTS = {"int8": "int8", "fp8": "fp8"}  # activations -> the kind they go with


@dataclass(frozen=True)
class QuantSpec:
    """How weights [k, n] are stored, and what their inputs go through first (docs/graph.md).

    int4    signed 4-bit codes, a scale for every `block` of a column
    int8    signed 8-bit codes, a scale for every column, or every `block` of one
    fp8     e4m3 codes, a scale for every column, or every `block` of one
    mxfp8   e4m3 codes, a power of two for every 32 of a column
    nvfp4   e2m1 codes, an e4m3 scale for every 16 of a column, one float32 over all
    """

    kind: QuantKind = "none"
    block: int | None = None  # weights along k that share a scale; None: a whole column
    zero_points: bool = False  # int4: (code - zero) * scale, as an extra product
    prescaled: bool = False  # some inputs are multiplied by a vector first (AWQ, SmoothQuant)
    activations: Literal["none", "int8", "fp8"] = "none"  # inputs are rounded, at a static scale
    plain: tuple[str, ...] = ()  # what stays in the graph's dtype: "head", "layers.3.qkv"

    def __post_init__(self) -> None:
        self._check_block()
        if self.activations != "none" and (
            _ROUNDED_INPUTS[self.activations] != self.kind or self.block is not None
        ):
            raise ValueError(f"{self.kind} weights with {self.activations} activations")
        if self.zero_points and self.kind != "int4":
            raise ValueError(f"kind {self.kind} with zero points")
        if self.kind == "none" and (self.prescaled or self.plain):
            raise ValueError("kind none with prescaled inputs or plain matrices")
        if list(self.plain) != sorted(set(self.plain)):
            raise ValueError("the plain matrices are not in order, each once")
        for name in self.plain:
            if not is_matrix(name):
                raise ValueError(f"{name[:80]!r} names no matrix")

    def _check_block(self) -> None:
        if self.kind in _FIXED_BLOCKS and self.block != _FIXED_BLOCKS[self.kind]:
            raise ValueError(f"kind {self.kind} with a block of {self.block}")
        if self.kind == "int4" and self.block is None:
            raise ValueError("kind int4 without a block")
        if self.block is not None and not 1 <= self.block <= _MAX_BLOCK:
            raise ValueError(f"block is {self.block}, outside 1 to {_MAX_BLOCK}")

    def quantizes(self, matrix: str) -> bool:
        """Whether this matrix ("head", "layers.3.qkv") is stored as codes."""
        return self.kind != "none" and matrix not in self.plain

    def describe(self) -> str:
        """For people: "int4 in blocks of 32", "int8 with int8 activations"."""
        words: str = self.kind
        if self.block is not None and self.kind not in _FIXED_BLOCKS:
            words += f" in blocks of {self.block}"
        if self.zero_points:
            words += ", zero points"
        if self.activations != "none":
            words += f" with {self.activations} activations"
        return f"{words}, prescaled" if self.prescaled else words


def least_compute_capability(quant: QuantSpec) -> int | None:
    """Of an NVIDIA device whose TensorRT builds such weights (89: Ada, 100: Blackwell); None: any
    that TensorRT supports. ONNX Runtime's build takes all kinds everywhere."""
    if quant.kind == "nvfp4":
        return 100
    return 89 if quant.kind in ("fp8", "mxfp8") else None
