"""Explains a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from remora_build.export.options import legacy_spec
from remora_build.families.shape import used_projections
from remora_build.inspect.decoder import decoder_facts
from remora_build.inspect.files import files_table, verified_text
from remora_build.inspect.render import Report, Table, size_text
from remora_build.publish.source import kv_bytes_per_token
from remora_contract.bundle import Bundle, load_bundle
from remora_contract.digests import short
from remora_contract.quant import least_compute_capability
from remora_contract.strict import plain

_MOST_NAMES = 3


def describe_bundle(directory: Path, *, verify: bool = False) -> Report:
    """Raises ArtifactInvalid, DocumentInvalid."""
    bundle = load_bundle(directory)
    verified = verified_text(directory, bundle.files, verify)
    return Report(
        title=f"Bundle {directory} ({short(bundle.digest)})",
        data=_data(bundle, verified=verify),
        facts=(*_facts(bundle), ("files", verified)),
        tables=(_shapes_table(bundle), files_table(bundle.files)),
    )


def _facts(bundle: Bundle) -> tuple[tuple[str, str], ...]:
    decoder, graph, source = bundle.decoder, bundle.graph, bundle.source
    per_token = kv_bytes_per_token(bundle)
    per_row = per_token * graph.context
    return (
        ("digest", bundle.digest),
        ("base", bundle.base_digest),
        ("source", f"{source.name} ({source.model_type}, {source.dtype})"),
        *decoder_facts(decoder),
        ("graph", _graph_text(bundle)),
        ("weights", _quant_text(bundle)),
        ("context", f"{graph.context} tokens (the checkpoint allows {decoder.max_position})"),
        (
            "KV cache",
            f"{size_text(per_token)} a token, {size_text(per_row)} a row",
        ),
        ("adapter bank", _bank_text(bundle)),
        ("size", size_text(bundle.bytes)),
        ("written by", bundle.exporter),
        *((key.replace("_", " "), _note_text(note)) for key, note in bundle.notes.items()),
    )


def _graph_text(bundle: Bundle) -> str:
    graph = bundle.graph
    if graph.dialect == "edgellm":
        return "none: an engine folder of TensorRT Edge-LLM, in edgellm/"
    text = f"{graph.dialect} dialect, opset {graph.opset}, {graph.dtype}"
    if len(bundle.dialects) == 1:
        return text
    second = legacy_spec(graph)
    return f"{text}; and {second.dialect} dialect, opset {second.opset}, on the same weights"


def _note_text(note: object) -> str:
    if isinstance(note, dict):
        return ", ".join(f"{key} {value}" for key, value in note.items())
    return str(note)


def _quant_text(bundle: Bundle) -> str:
    quant = bundle.graph.quant
    if bundle.graph.dialect == "edgellm":
        return "in the engine, whose folder does not say how they are stored"
    if quant.kind == "none":
        return f"{bundle.graph.dtype}, not quantized"
    words = quant.describe()
    if quant.plain:
        few = len(quant.plain) <= _MOST_NAMES
        what = ", ".join(quant.plain) if few else f"{len(quant.plain)} matrices"
        words += f"; {bundle.graph.dtype}: {what}"
    least = least_compute_capability(quant)
    if least is not None:
        words += f"; TensorRT needs compute capability {least // 10}.{least % 10}"
    return words


def _bank_text(bundle: Bundle) -> str:
    rank = bundle.graph.max_bank_rank
    if rank and bundle.graph.dialect == "edgellm":
        return f"none: one adapter at a time, of rank {rank} at most"
    return f"resident ranks add up to {rank} at most" if rank else "none: takes no adapters"


def _shapes_table(bundle: Bundle) -> Table:
    decoder = bundle.decoder
    rows = tuple(
        (p, str(decoder.in_features(p)), str(decoder.out_features(p)))
        for p in used_projections(decoder)
    )
    return Table("Projections", ("projection", "in (k)", "out (n)"), rows)


def _data(bundle: Bundle, *, verified: bool) -> dict[str, Any]:
    return {
        "kind": "bundle",
        "digest": bundle.digest,
        "bytes": bundle.bytes,
        "kv_bytes_per_token": kv_bytes_per_token(bundle),
        "verified": verified,
        "document": plain(bundle),
    }
