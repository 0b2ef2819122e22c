"""A bundle or adapter directory as something to publish: its document, its files, its facts.

Owns which facts a manifest carries for the planner; writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remora_contract.adapter import ADAPTER_JSON, Adapter, load_adapter
from remora_contract.artifact import Kind
from remora_contract.bundle import BUNDLE_JSON, Bundle, BundleFile, load_bundle
from remora_contract.digests import digest_file
from remora_contract.engine import (
    ENGINE_JSON,
    EngineDocument,
    load_engine_document,
    manifest_facts,
)
from remora_contract.errors import ArtifactInvalid
from remora_contract.memory_need import memory_facts
from remora_contract.trt_memory import ITEM_BYTES


@dataclass(frozen=True)
class Source:
    """`files` starts with the document itself, so that a reader can verify the rest as it comes."""

    directory: Path
    kind: Kind
    digest: str
    base_digest: str
    files: tuple[BundleFile, ...]
    facts: dict[str, Any]


def open_source(directory: Path) -> Source:
    """Raises ArtifactInvalid or DocumentInvalid; verifies no file yet."""
    if (directory / BUNDLE_JSON).exists():
        bundle = load_bundle(directory)
        return _source(directory, "bundle", BUNDLE_JSON, bundle, bundle_facts(bundle))
    if (directory / ADAPTER_JSON).exists():
        adapter = load_adapter(directory)
        return _source(directory, "adapter", ADAPTER_JSON, adapter, adapter_facts(adapter))
    if (directory / ENGINE_JSON).exists():
        engine = load_engine_document(directory)
        return _source(directory, "engine", ENGINE_JSON, engine, manifest_facts(engine))
    raise ArtifactInvalid(
        f"{directory} holds neither {BUNDLE_JSON} nor {ADAPTER_JSON} nor {ENGINE_JSON}: publish "
        "takes what remora-build export, adapter or engine wrote, or an engine of an agent's cache"
    )


def _source(
    directory: Path,
    kind: Kind,
    name: str,
    document: Bundle | Adapter | EngineDocument,
    facts: dict[str, Any],
) -> Source:
    path = directory / name
    own = BundleFile(name, path.stat().st_size, digest_file(path))
    files = (own, *document.files)
    return Source(directory, kind, document.digest, document.base_digest, files, facts)


def kv_bytes_per_token(bundle: Bundle) -> int:
    """Cache bytes one token takes in one row: key and value of every layer."""
    decoder = bundle.decoder
    item_bytes = ITEM_BYTES[bundle.graph.dtype]
    return 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * item_bytes


def bundle_facts(bundle: Bundle) -> dict[str, Any]:
    decoder, graph = bundle.decoder, bundle.graph
    return {
        "model": bundle.source.name,
        "family": decoder.family,
        "dialect": graph.dialect,
        **({"dialects": list(bundle.dialects)} if len(bundle.dialects) > 1 else {}),
        "opset": graph.opset,
        "dtype": graph.dtype,
        "quant": bundle.stored,
        "quant_block": graph.quant.block,
        "activations": graph.quant.activations,
        "experts": decoder.experts is not None,
        "context": graph.context,
        "max_bank_rank": graph.max_bank_rank,
        "layers": decoder.layers,
        "hidden": decoder.hidden,
        "kv_heads": decoder.kv_heads,
        "head_dim": decoder.head_dim,
        "vocab": decoder.vocab,
        "kv_bytes_per_token": kv_bytes_per_token(bundle),
        **memory_facts(bundle),
    }


def adapter_facts(adapter: Adapter) -> dict[str, Any]:
    return {
        "rank": adapter.rank,
        "ranks": {p: adapter.rank_of(p) for p in adapter.projections()},
        "projections": list(adapter.projections()),
        "dtype": adapter.dtype,
    }
