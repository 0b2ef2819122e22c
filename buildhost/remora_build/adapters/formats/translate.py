"""One adapter directory of any format + one bundle -> one of another format. Ties readers and
writers together, each imported where it is used; decides only which options a format takes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from remora_build.adapters.convert import (
    Help,
    base_weights,
    check_fits,
    convert_adapter,
    read_adapter,
)
from remora_build.adapters.formats.carried import Carried
from remora_build.adapters.formats.registry import (
    STORED_DTYPES,
    ForeignFormat,
    GateUpOrder,
    SourceFormat,
    StoredDtype,
    TargetFormat,
    detect,
)
from remora_build.adapters.sidecar import Dtype, write_adapter
from remora_build.staging import staged_directory
from remora_contract.bundle import Bundle, load_bundle
from remora_contract.errors import UsageWrong

DTYPES: dict[TargetFormat, tuple[StoredDtype, ...]] = {
    "remora": ("float16", "float32"),
    "edgellm": ("float16",),
    "trtllm": STORED_DTYPES,
}
# What a format has a place for beside plain factors: fields of `Factor` and `Carried`.
CARRIES: dict[TargetFormat, frozenset[str]] = {
    "remora": frozenset({"scale", "bias", "invocation_tokens"}),
    "edgellm": frozenset(),
    "trtllm": frozenset({"scale"}),
}
MAX_TP_SIZE = 1024

if TYPE_CHECKING:
    from remora_build.adapters.formats.manifest import ForeignAdapter
    from remora_build.export.progress import Progress
    from remora_contract.adapter import Adapter

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """`source` None: what the directory shows. `dtype` None: the bundle's, or the only one there
    is. `gate_up`: the order of a fused gate and up in TensorRT-LLM's files, where they have it."""

    source: SourceFormat | None = None
    target: TargetFormat = "remora"
    dtype: StoredDtype | None = None
    tp_size: int = 1
    gate_up: GateUpOrder | None = None
    replace: bool = False
    checkpoint: Path | None = None  # of the base, and the adapter before training: for PEFT alone
    initial: Path | None = None


def translate(
    directory: Path,
    out: Path,
    *,
    base: Path,
    options: Options,
    progress: Progress | None = None,
) -> Adapter | ForeignAdapter:
    """Writes OUT whole or not at all, and returns its document.

    Raises UsageWrong for options that do not go together; Unsupported, AdapterInvalid, Refused,
    ArtifactInvalid, DocumentInvalid as the readers and `convert_adapter` do; Conflict (OUT exists),
    Exhausted (full disk).
    """
    source = options.source or detect(directory)
    check_options(source, options)
    if (source, options.target) == ("peft", "remora"):
        return convert_adapter(
            directory,
            out,
            base=base,
            dtype=_sidecar_dtype(options.dtype),
            replace=options.replace,
            help=Help(options.checkpoint, options.initial),
            progress=progress,
        )
    bundle = load_bundle(base)
    if source == "peft":
        own = base_weights(base, bundle, options.checkpoint, progress)
        peft = read_adapter(directory, bundle, own, options.initial)
        carried = Carried(peft.factors, peft.config, peft.invocation_tokens)
    else:
        carried = read(directory, source, bundle, options.gate_up)
    carried.check_only(CARRIES[options.target])
    written: Adapter | ForeignAdapter
    if options.target == "remora":
        check_fits(carried.factors, bundle)
        written = write_adapter(
            out,
            carried.factors,
            base_digest=bundle.base_digest,
            dtype=_sidecar_dtype(options.dtype) or bundle.graph.dtype,
            source_config=carried.source_config,
            invocation_tokens=carried.invocation_tokens,
            replace=options.replace,
        )
    else:
        written = write_foreign(out, options.target, carried, bundle, options)
    log.info(
        "adapter.translated",
        extra={"source": source, "target": options.target, "targets": len(carried.factors)},
    )
    return written


def check_options(source: SourceFormat, options: Options) -> None:
    """Raises UsageWrong naming the option that the formats at hand do not take."""
    target, dtypes = options.target, DTYPES[options.target]
    if options.dtype is not None and options.dtype not in dtypes:
        raise UsageWrong(f"--format {target} stores {' or '.join(dtypes)}, not {options.dtype}")
    if options.tp_size != 1 and target != "trtllm":
        raise UsageWrong(f"--tp-size belongs to --format trtllm, not to {target}")
    if not 1 <= options.tp_size <= MAX_TP_SIZE:
        raise UsageWrong(f"--tp-size must be 1 to {MAX_TP_SIZE}")
    helped = options.checkpoint is not None or options.initial is not None
    if helped and source != "peft":
        raise UsageWrong(f"--checkpoint and --initial help to read peft, not {source}")
    if options.gate_up is not None and source != "trtllm":
        raise UsageWrong(f"--gate-up-order tells how to read trtllm, not {source}")


def read(
    directory: Path, source: SourceFormat, bundle: Bundle, gate_up: GateUpOrder | None
) -> Carried:
    """An adapter in memory that is not PEFT's, bound to the bundle's decoder."""
    if source == "remora":
        from remora_build.adapters.formats.remora import read_remora

        return read_remora(directory, bundle)
    if source == "edgellm":
        from remora_build.adapters.formats.edgellm import read_edgellm

        return read_edgellm(directory, bundle)
    from remora_build.adapters.formats.trtllm_read import read_trtllm

    return read_trtllm(directory, bundle, gate_up)


def write_foreign(
    out: Path, target: ForeignFormat, carried: Carried, bundle: Bundle, options: Options
) -> ForeignAdapter:
    """Writes the format's files and remora.json, and returns that. Raises AdapterInvalid, Conflict,
    Exhausted."""
    from remora_build.adapters.formats.manifest import MANIFEST, write_manifest

    dtype = options.dtype or ("float16" if target == "edgellm" else bundle.graph.dtype)
    with staged_directory(out, marker=MANIFEST, replace=options.replace) as staging:
        if target == "edgellm":
            from remora_build.adapters.formats.edgellm import write_edgellm

            write_edgellm(staging, carried)
        else:
            from remora_build.adapters.formats.trtllm import write_trtllm

            write_trtllm(staging, carried, bundle.decoder, dtype, options.tp_size)
        return write_manifest(
            staging,
            target,
            carried,
            base_digest=bundle.base_digest,
            dtype=dtype,
            tp_size=options.tp_size,
        )


def _sidecar_dtype(dtype: StoredDtype | None) -> Dtype | None:
    return None if dtype is None else "float32" if dtype == "float32" else "float16"
