"""The checkpoint to export: its decoder, its tensors and, of a quantized one, what its codes mean
and for which adapters they are. All is checked before the first byte is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from remora_build.checkpoint.directory import find_tensors
from remora_build.checkpoint.inventory import Inventory, take_inventory
from remora_build.checkpoint.safetensors_file import SourceDtype
from remora_build.export.options import ExportOptions, refuse_quantizing
from remora_build.export.progress import Progress
from remora_build.families import left_out_of, naming, read_config
from remora_build.quantized.original import restore
from remora_build.quantized.plan import QuantizedPlan, plan_quantized
from remora_build.quantized.scheme import read_scheme
from remora_build.quantized.section import Scheme
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import RequestInvalid, Unsupported


@dataclass(frozen=True)
class Source:
    """`base_digest`: the original's, when one was given; None: of these tensors."""

    spec: DecoderSpec
    inventory: Inventory
    quantized: QuantizedPlan | None = None
    base_digest: str | None = None

    @property
    def notes(self) -> dict[str, str]:
        """For bundle.json: by which tool it is quantized, and what of it is left out."""
        if self.quantized is None:
            return {}
        scheme = self.quantized.scheme
        return {"by": scheme.layout.title, **scheme.notes, "adapters": self._fitting()}

    def _fitting(self) -> str:
        if self.base_digest is not None:
            return "of the original checkpoint"
        if self.quantized is not None and self.quantized.scheme.folded is False:
            return "of this checkpoint; nothing is folded, so the original's are the same"
        return "of this quantized checkpoint"


def read_source(checkpoint: Path, options: ExportOptions, progress: Progress) -> Source:
    """Raises CheckpointInvalid, RequestInvalid, Unsupported."""
    scheme = read_scheme(checkpoint)
    spec, left_out = read_config(checkpoint, quantized=scheme is not None), left_out_of(checkpoint)
    if scheme is None:
        if options.original is not None or options.own_adapters:
            raise RequestInvalid("--original and --own-adapters are for quantized checkpoints")
        tensors = find_tensors(checkpoint)
        names = naming(spec, tensors)
        return Source(names.spec, take_inventory(names, tensors, left_out))
    refuse_quantizing(options)
    tensors = find_tensors(checkpoint, get_args(SourceDtype))
    names = naming(spec, scheme.layout.logical(tensors))
    plan = plan_quantized(names, scheme, tensors)
    inventory = take_inventory(names, tensors, left_out, stored=plan.stored, instead=plan.tensors)
    if options.original is not None:
        advance = progress.stage("comparing with the original", spec.layers)
        restored = restore(inventory, plan, options.original, advance)
        return Source(names.spec, inventory, restored.plan, restored.base_digest)
    _check_adapters(scheme, plan, options)
    return Source(names.spec, inventory, plan)


def _check_adapters(scheme: Scheme, plan: QuantizedPlan, options: ExportOptions) -> None:
    """Raises Unsupported when adapters of the original would read another activation unnoticed."""
    named = scheme.layout.prescale is not None
    whole = named and all(matrix.prescaled for matrix in plan.stored.values())
    if not scheme.folded or whole or options.own_adapters or options.max_bank_rank == 0:
        return
    raise Unsupported(
        f"{scheme.layout.title} has folded its smoothing into norms, so an adapter of the original "
        "model would read another activation. Give --original CHECKPOINT (adapters trained on it "
        "fit), --own-adapters (adapters were trained on this very checkpoint) or --max-bank-rank 0"
    )
