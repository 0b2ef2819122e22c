"""One PEFT directory + one bundle -> one sidecar. Ties reading, binding, algebra and writing
together; decides nothing itself but what the bundle has room for.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remora_build.adapters.assemble import Assembly, Branches, folded_tensors
from remora_build.adapters.base import BaseWeights, NoBase
from remora_build.adapters.base_bundle import BundleBase
from remora_build.adapters.binding import bind
from remora_build.adapters.budget import matching
from remora_build.adapters.initial import check_initial, minus_initial
from remora_build.adapters.peft_directory import open_weights, read_settings
from remora_build.adapters.sidecar import Dtype, Factor, target_ranks, write_adapter
from remora_contract.adapter import Adapter
from remora_contract.bundle import Bundle, load_bundle
from remora_contract.compat import feature_refusal, target_refusals
from remora_contract.digests import short
from remora_contract.errors import AdapterInvalid, Incompatible, Refused, Unsupported
from remora_contract.targets import AdapterTarget

if TYPE_CHECKING:
    from remora_build.export.progress import Progress

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
    help = help or Help()
    own = base_weights(base, bundle, help.checkpoint, progress)
    read = read_adapter(peft_dir, bundle, own, help.initial)
    check_fits(read.factors, bundle)
    check_invocation(read.invocation_tokens, bundle)
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


def read_peft(peft_dir: Path, bundle: Bundle) -> tuple[dict[AdapterTarget, Factor], dict[str, Any]]:
    """(factors with the scaling in b, the config as it stands) of plain LoRA, which needs nothing
    of the base. Raises as `convert_adapter`; Unsupported for anything else."""
    read = read_adapter(peft_dir, bundle, NoBase(), None)
    if read.invocation_tokens:
        raise Unsupported("alora_invocation_tokens cannot be carried to another format")
    return read.factors, read.config


def read_adapter(
    peft_dir: Path, bundle: Bundle, base: BaseWeights, initial_dir: Path | None
) -> PeftAdapter:
    """`initial_dir` holds the adapter before its training. Raises as `convert_adapter`."""
    settings, config = read_settings(peft_dir)
    if settings.use_dora and not bundle.graph.dora:  # before anything of the base is asked for
        raise Incompatible([feature_refusal("adapter_dora", "--dora")])
    initial = None if initial_dir is None else read_settings(initial_dir)[0]
    check_initial(settings, initial, str(peft_dir), str(initial_dir))
    with ExitStack() as stack:
        weights = stack.enter_context(open_weights(peft_dir))
        with matching(str(peft_dir)):
            bound = bind(settings, weights.shapes(), bundle.decoder)
        branches: Branches = folded_tensors(weights)
        if initial_dir is not None and initial is not None:
            first = stack.enter_context(open_weights(initial_dir))
            with matching(str(initial_dir)):
                first_bound = bind(initial, first.shapes(), bundle.decoder)
            branches = minus_initial(bound, weights, first_bound, first)
        own = stack.enter_context(base)
        factors = Assembly(bound, bundle.decoder, weights, branches, own).factors()
        own.confirm()
    return PeftAdapter(factors, config, settings.invocation_tokens)


def check_fits(factors: Mapping[AdapterTarget, Factor], bundle: Bundle) -> None:
    """Raises Refused when the bundle's bank is too narrow, Incompatible when its graph lacks inputs
    that the adapter needs."""
    check_bank({target: factor.rank for target, factor in factors.items()}, bundle)
    if refusals := target_refusals(bundle, target_ranks(factors)):
        raise Incompatible(refusals)


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


def check_invocation(tokens: tuple[int, ...], bundle: Bundle) -> None:
    """Raises AdapterInvalid for tokens that no prompt of this base can hold."""
    highest, vocab = max(tokens, default=0), bundle.decoder.vocab
    if highest >= vocab:
        raise AdapterInvalid(
            f"alora_invocation_tokens has token {highest}, the base's tokens are 0 to {vocab - 1}: "
            "it was trained on another base; give the bundle of that base with --base"
        )


def base_weights(
    bundle_dir: Path, bundle: Bundle, checkpoint: Path | None, progress: Progress | None
) -> BaseWeights:
    """The checkpoint where one is given, else what the bundle has of it."""
    if checkpoint is None:
        return BundleBase(bundle_dir, bundle)
    from remora_build.adapters.base_checkpoint import CheckpointBase  # as heavy as an export

    base = CheckpointBase(checkpoint, bundle)
    if progress is not None:
        base.advance = progress.stage("base weights", base.bytes)
    return base
