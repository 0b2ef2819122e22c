"""Explains a converted adapter."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from remora_build.inspect.files import files_table, verified_text
from remora_build.inspect.render import Report, Table, ranges, size_text
from remora_contract.adapter import Adapter, TargetRank, load_adapter
from remora_contract.digests import short
from remora_contract.strict import plain
from remora_contract.targets import ALL_PROJECTIONS

_SHOWN_SETTINGS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def describe_adapter(directory: Path, *, verify: bool = False) -> Report:
    """Raises ArtifactInvalid, DocumentInvalid."""
    return report_of(directory, load_adapter(directory), verify=verify)


def report_of(directory: Path, adapter: Adapter, *, verify: bool = False) -> Report:
    """Of the adapter whose document is at hand. Raises ArtifactInvalid."""
    verified = verified_text(directory, adapter.files, verify)
    source = adapter.source_config
    invoked = (("acts from", _invocation(adapter)),) if adapter.invocation_tokens else ()
    facts = (
        ("digest", adapter.digest),
        ("base", adapter.base_digest),
        ("trained on", str(source.get("base_model_name_or_path") or "not said")),
        ("dtype", adapter.dtype),
        ("rank", f"{adapter.rank} bank columns"),
        ("projections", ", ".join(adapter.projections())),
        *invoked,
        ("size", size_text(adapter.bytes)),
        ("PEFT", ", ".join(f"{k} = {source[k]}" for k in _SHOWN_SETTINGS if source.get(k))),
        ("written by", adapter.exporter),
        ("files", verified),
    )
    return Report(
        title=f"Adapter {directory} ({short(adapter.digest)})",
        data=_data(adapter, verified=verify),
        facts=facts,
        tables=(targets_table(adapter.targets), files_table(adapter.files)),
    )


def _invocation(adapter: Adapter) -> str:
    shown = ", ".join(map(str, adapter.invocation_tokens[:16]))
    more = len(adapter.invocation_tokens) - 16
    tail = f" and {more} more" if more > 0 else ""
    return f"the last tokens {shown}{tail} in the prompt on; without them it is the base model"


def _data(adapter: Adapter, *, verified: bool) -> dict[str, Any]:
    return {
        "kind": "adapter",
        "digest": adapter.digest,
        "bytes": adapter.bytes,
        "rank": adapter.rank,
        "projections": list(adapter.projections()),
        "verified": verified,
        "document": plain(adapter),
    }


def targets_table(targets: tuple[TargetRank, ...]) -> Table:
    """One row for all layers that share projection, rank, scaling and what stands beside them."""
    layers: dict[tuple[int, int, float, str], list[int]] = defaultdict(list)
    for t in targets:
        beside = " and ".join([*(["DoRA"] if t.dora else []), *(["bias"] if t.bias else [])])
        key = (ALL_PROJECTIONS.index(t.projection), t.rank, t.scaling, beside)
        layers[key].append(t.layer)
    shown = any(beside for *_, beside in layers)
    rows = tuple(
        (
            ALL_PROJECTIONS[p],
            str(rank),
            f"{scaling:g}",
            *((beside or "-",) if shown else ()),
            ranges(found),
        )
        for (p, rank, scaling, beside), found in sorted(layers.items())
    )
    columns = ("projection", "rank", "scaling", *(("beside",) if shown else ()), "layers")
    return Table("Targets", columns, rows)
