"""One PEFT directory + one bundle -> one sidecar. Ties reading, binding, algebra and writing
together; decides nothing itself but the bank's limit.
"""

from __future__ import annotations

import logging
from pathlib import Path

from remora_build.adapters.binding import Binding, bind
from remora_build.adapters.fold import fold
from remora_build.adapters.settings import parse_settings, read_config
from remora_build.adapters.sidecar import Dtype, write_adapter
from remora_build.adapters.weights import PeftWeights
from remora_contract.adapter import Adapter
from remora_contract.bundle import Bundle, load_bundle
from remora_contract.digests import short
from remora_contract.errors import AdapterInvalid, Refused

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
    config_path = peft_dir / CONFIG_FILE
    config = read_config(config_path)
    settings = parse_settings(config, str(config_path))
    with PeftWeights(_weights_path(peft_dir)) as weights:
        bindings = bind(settings, weights.shapes(), bundle.decoder)
        check_bank(bindings, bundle)
        factors = {
            b.target: fold(b, weights.float32(b.tensor_a), weights.float32(b.tensor_b))
            for b in bindings
        }
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
        extra={"digest": short(adapter.digest), "targets": len(bindings), "rank": adapter.rank},
    )
    return adapter


def check_bank(bindings: tuple[Binding, ...], bundle: Bundle) -> None:
    """Raises Refused when the adapter alone is wider than the bundle's bank."""
    widest = max(bindings, key=lambda b: b.rank)
    limit = bundle.graph.max_bank_rank
    if limit == 0:
        raise Refused(
            "the bundle was exported without a bank (--max-bank-rank 0): it takes no adapters"
        )
    if widest.rank > limit:
        raise Refused(
            f"{widest.target.name()} has rank {widest.rank}, the bundle's bank holds {limit}: "
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
