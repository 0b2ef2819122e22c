"""One PEFT directory + one bundle -> one sidecar. Ties reading, binding, algebra and writing
together; decides nothing itself but the bank's limit.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from remora_build.adapters.binding import bind
from remora_build.adapters.fold import fold
from remora_build.adapters.settings import parse_settings, read_config
from remora_build.adapters.sidecar import Dtype, Factor, write_adapter
from remora_build.adapters.weights import PeftWeights
from remora_contract.adapter import Adapter
from remora_contract.bundle import Bundle, load_bundle
from remora_contract.digests import short
from remora_contract.errors import AdapterInvalid, Refused
from remora_contract.targets import AdapterTarget

CONFIG_FILE = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"

log = logging.getLogger(__name__)


def convert_adapter(
    peft_dir: Path,
    out: Path,
    *,
    base: Path,
    dtype: Dtype | None = None,
    replace: bool = False,
) -> Adapter:
    """Writes the sidecar OUT for the bundle directory `base`; `dtype` None: the bundle's own.

    Raises Unsupported (a feature that is not carried, by name), AdapterInvalid (cannot be carried
    faithfully), Refused (more rank than the bundle's bank), ArtifactInvalid or DocumentInvalid
    (damaged input), Conflict (OUT exists), Exhausted (full disk).
    """
    bundle = load_bundle(base)
    factors, config = read_peft(peft_dir, bundle)
    check_bank({target: factor.rank for target, factor in factors.items()}, bundle)
    adapter = write_adapter(
        out,
        factors,
        base_digest=bundle.base_digest,
        dtype=dtype or bundle.graph.dtype,
        source_config=config,
        replace=replace,
    )
    log.info(
        "adapter.converted",
        extra={"digest": short(adapter.digest), "targets": len(factors), "rank": adapter.rank},
    )
    return adapter


def read_peft(peft_dir: Path, bundle: Bundle) -> tuple[dict[AdapterTarget, Factor], dict[str, Any]]:
    """(factors with the scaling in b, the config as it stands). Raises as `convert_adapter`."""
    config_path = peft_dir / CONFIG_FILE
    config = read_config(config_path)
    settings = parse_settings(config, str(config_path))
    with PeftWeights(_weights_path(peft_dir)) as weights:
        bindings = bind(settings, weights.shapes(), bundle.decoder)
        factors = {
            b.target: fold(b, weights.float32(b.tensor_a), weights.float32(b.tensor_b))
            for b in bindings
        }
    return factors, config


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


def _weights_path(peft_dir: Path) -> Path:
    """Safetensors before a pickle, as PEFT takes them."""
    path = peft_dir / PEFT_WEIGHTS
    if path.exists():
        return path
    if (peft_dir / PICKLED_WEIGHTS).exists():
        return peft_dir / PICKLED_WEIGHTS
    raise AdapterInvalid(f"{peft_dir} has no {PEFT_WEIGHTS}: is it a PEFT adapter directory?")
