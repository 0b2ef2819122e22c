"""One PEFT directory + one bundle -> one sidecar. Ties reading, binding, algebra and writing
together; decides nothing itself but what the bundle has room for.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remora_build.adapters.assemble import Assembly, Branches, folded_tensors
from remora_build.adapters.base import BaseWeights
from remora_build.adapters.base_bundle import BundleBase
from remora_build.adapters.binding import bind
from remora_build.adapters.initial import check_initial, minus_initial
from remora_build.adapters.peft_directory import Weights, open_weights, read_settings
from remora_build.adapters.sidecar import Dtype, Factor, target_ranks, write_adapter
from remora_build.export.progress import Progress, SilentProgress
from remora_contract.adapter import Adapter
from remora_contract.bundle import Bundle, load_bundle
from remora_contract.compat import target_refusals
from remora_contract.digests import short
from remora_contract.errors import Incompatible, Refused
from remora_contract.targets import AdapterTarget

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PeftAdapter:
    """A PEFT adapter on one base, the scaling in each factor's b."""

    factors: dict[AdapterTarget, Factor]
    config: dict[str, Any]  # adapter_config.json as it stands
    invocation_tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Help:
    """What else a conversion may need: the base's checkpoint, and the adapter before training."""

    checkpoint: Path | None = None
    initial: Path | None = None


def convert_adapter(
    peft_dir: Path,
    out: Path,
    *,
    base: Path,
    dtype: Dtype | None = None,
    replace: bool = False,
    help: Help | None = None,
    progress: Progress | None = None,
) -> Adapter:
    """Writes the sidecar OUT for the bundle directory `base`; `dtype` None: the bundle's own.

    Raises Unsupported (a feature that is not carried, by name), AdapterInvalid (cannot be carried
    faithfully), Refused (more rank than the bundle's bank, or a base that is not at hand),
    Incompatible (inputs that the bundle's graph lacks), ArtifactInvalid or DocumentInvalid (damaged
    input), Conflict (OUT exists), Exhausted (full disk).
    """
    bundle = load_bundle(base)
    read = read_peft(peft_dir, bundle, base=base, help=help, progress=progress)
    check_bank({target: factor.rank for target, factor in read.factors.items()}, bundle)
    if refusals := target_refusals(bundle, target_ranks(read.factors)):
        raise Incompatible(refusals)
    adapter = write_adapter(
        out,
        read.factors,
        base_digest=bundle.base_digest,
        dtype=dtype or bundle.graph.dtype,
        source_config=read.config,
        invocation_tokens=read.invocation_tokens,
        replace=replace,
    )
    log.info(
        "adapter.converted",
        extra={"digest": short(adapter.digest), "targets": len(read.factors), "rank": adapter.rank},
    )
    return adapter


def read_peft(
    peft_dir: Path,
    bundle: Bundle,
    *,
    base: Path,
    help: Help | None = None,
    progress: Progress | None = None,
) -> PeftAdapter:
    """`base` is the directory of `bundle`. Raises as `convert_adapter`."""
    help = help or Help()
    settings, config = read_settings(peft_dir)
    initial = None if help.initial is None else read_settings(help.initial)[0]
    check_initial(settings, initial, str(peft_dir), str(help.initial))
    with ExitStack() as stack:
        weights: Weights = stack.enter_context(open_weights(peft_dir))
        bound = bind(settings, weights.shapes(), bundle.decoder)
        branches: Branches = folded_tensors(weights)
        if help.initial is not None and initial is not None:
            first: Weights = stack.enter_context(open_weights(help.initial))
            first_bound = bind(initial, first.shapes(), bundle.decoder)
            branches = minus_initial(bound, weights, first_bound, first)
        own = stack.enter_context(_base(base, bundle, help.checkpoint, progress))
        factors = Assembly(bound, bundle.decoder, weights, branches, own).factors()
        own.confirm()
    return PeftAdapter(factors, config, settings.invocation_tokens)


def check_bank(ranks: Mapping[AdapterTarget, int], bundle: Bundle) -> None:
    """Raises Refused when the adapter alone is wider than the bundle's bank."""
    widest = max(ranks, key=lambda target: ranks[target])
    limit = bundle.graph.max_bank_rank
    if limit == 0:
        raise Refused(
            "the bundle was exported without a bank (--max-bank-rank 0): it takes no adapters"
        )
    if ranks[widest] > limit:
        raise Refused(
            f"{widest.name()} has rank {ranks[widest]}, the bundle's bank holds {limit}: "
            "export the base again with a larger --max-bank-rank"
        )


def _base(
    bundle_dir: Path, bundle: Bundle, checkpoint: Path | None, progress: Progress | None
) -> BaseWeights:
    """The checkpoint where one is given, else what the bundle has of it."""
    if checkpoint is None:
        return BundleBase(bundle_dir, bundle)
    from remora_build.adapters.base_checkpoint import CheckpointBase

    base = CheckpointBase(checkpoint, bundle)
    base.advance = (progress or SilentProgress()).stage("base weights", base.bytes)
    return base
