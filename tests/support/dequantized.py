"""A reference model that computes with what a bundle's 4-bit codes stand for. Uses nothing of
Remora's own arithmetic; the names of modules are Remora's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from remora_build.families import namings
from remora_build.families.naming import ModulePart, Naming
from remora_contract.bundle import GRAPH_FILE
from remora_contract.decoder import DecoderSpec
from remora_contract.targets import PARTS


class DequantizedBundle:
    """The matrices [k, n] of one bundle; of experts [E, k, n]."""

    def __init__(self, bundle: Path, spec: DecoderSpec) -> None:
        self._values = {v.name: v for v in ir.load(bundle / GRAPH_FILE).graph.initializers.values()}
        self._spec = spec

    def put_into(self, reference: torch.nn.Module) -> None:
        """Overwrites every projection, experts and the head too."""
        naming = self._naming_of(reference)
        holders = dict(reference.named_modules())
        parameters = dict(reference.named_parameters())
        with torch.no_grad():
            for path, parts in naming.modules().items():
                if path != naming.embedding.removesuffix(".weight"):
                    own = torch.from_numpy(self._rows(parts).copy())
                    holders[path].weight = torch.nn.Parameter(own)  # the head may have been tied
            for path, parts in naming.parameters().items():
                parameters[path].copy_(torch.from_numpy(self._rows(parts)))

    def _naming_of(self, reference: torch.nn.Module) -> Naming:
        modules = {name for name, _ in reference.named_modules()}
        return next(n for n in namings(self._spec) if set(n.modules()) <= modules)

    def _rows(self, parts: tuple[ModulePart, ...]) -> NDArray[np.float32]:
        """[n, k] or [E, n, k]: the parts one below the other."""
        return np.concatenate([self._part(p) for p in parts], axis=-2)

    def _part(self, part: ModulePart) -> NDArray[np.float32]:
        target = part.target
        if target.projection == "head":
            return self._matrix("head.weight").T
        packed = self._matrix(f"layers.{target.layer}.{target.group}.weight")
        before = PARTS[target.group][: PARTS[target.group].index(target.projection)]
        begin = sum(self._spec.out_features(p) for p in before)
        end = begin + self._spec.out_features(target.projection)
        return np.swapaxes(packed[..., begin:end], -1, -2)

    def _matrix(self, name: str) -> NDArray[np.float32]:
        codes = self._values[f"{name}.q"].const_value.numpy()
        scales = self._values[f"{name}.scale"].const_value.numpy().astype(np.float32)
        if codes.dtype == np.int32:
            digits = [(codes.view(np.uint32) >> (4 * j)) & 15 for j in range(8)]
            codes = np.concatenate(digits, axis=-2).astype(np.float32) - 8
        block = codes.shape[-2] // scales.shape[-2]
        return codes.astype(np.float32) * np.repeat(scales, block, axis=-2)
