"""What a build made, for people and for machines: layers, memory, time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from remora_agent.engine.build import BuildResult
from remora_agent.engine.opening import EngineOptions, limits_of
from remora_agent.engine.protocol import EngineLimits
from remora_agent.engine.recipe import dialect_of
from remora_agent.engine.trt.files import (
    FACT_ACTIVATION,
    FACT_LAYERS,
    FACT_WARNINGS,
    FACT_WEIGHTS,
    PLAN,
)
from remora_agent.engine.trt.inspector import Fused, fused_layers
from remora_agent.engine.trt.module import TRT_BACKENDS, load_module
from remora_contract.bundle import Bundle
from remora_contract.engine_memory import bank_bytes, kv_bytes
from remora_contract.trt_memory import TrtSizes


@dataclass(frozen=True)
class BuildReport:
    """Sizes in bytes; a memory part is None where the backend does not tell it before a run."""

    digest: str
    key: str
    backend: str
    version: str
    dialect: str  # of the graph it was built from
    instead_of: str  # why not of the bundle's better graph; "" where that was not tried
    processors: tuple[int, ...]  # compute capabilities; none: this machine's processor
    rows: int
    context: int
    from_cache: bool
    seconds: float
    directory: str
    layers: dict[str, int]  # kind -> how many, before fusion; empty where the backend does not tell
    layers_after_fusion: dict[str, int]  # kind and precision -> how many, of the engine
    layers_after_fusion_not_told: str  # why not; "" where they are, or the backend has none
    memory: dict[str, int | None]
    warnings: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {**vars(self), "processors": list(self.processors), "warnings": list(self.warnings)}

    def show(self) -> None:
        console = Console(highlight=False, markup=False, soft_wrap=True)
        console.print(f"engine {self.digest} in {self.directory}")
        gpus = f" for SM {', '.join(map(str, self.processors))}" if self.processors else ""
        source = "from the cache" if self.from_cache else f"built in {self.seconds:.1f} s"
        console.print(f"{self.backend} {self.version}{gpus}, {self.dialect} graph, {source}")
        if self.instead_of:
            console.print(f"not of the native graph: {self.instead_of}")
        memory = Table("memory", "MiB", box=None, pad_edge=False)
        memory.columns[1].justify = "right"
        for part, size in self.memory.items():
            memory.add_row(part, "not told" if size is None else f"{size / (1 << 20):.1f}")
        console.print(memory)
        for title, kinds in (
            ("layers before fusion", self.layers),
            ("layers after fusion", self.layers_after_fusion),
        ):
            if kinds:
                console.print(_counts(title, kinds))
        if self.layers_after_fusion_not_told:
            console.print(f"layers after fusion: not told: {self.layers_after_fusion_not_told}")
        for line in self.warnings:
            console.print(f"the builder warned: {line}")


def _counts(title: str, kinds: dict[str, int]) -> Table:
    table = Table(title, "count", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for kind, count in sorted(kinds.items(), key=lambda kv: (-kv[1], kv[0])):
        table.add_row(kind.lower(), str(count))
    return table


def report(
    result: BuildResult, bundle: Bundle, options: EngineOptions, out: Path | None
) -> BuildReport:
    manifest = result.entry.manifest
    recipe, facts = manifest.key.recipe, manifest.facts
    limits = limits_of(bundle, options)
    gpu = recipe.gpu
    fused = _fused(recipe.backend, result.entry.directory)
    return BuildReport(
        manifest.digest,
        manifest.key.digest,
        recipe.backend,
        recipe.backend_version,
        dialect_of(bundle, recipe),
        result.instead_of,
        () if gpu is None else gpu.processors,
        limits.rows,
        limits.context,
        result.from_cache,
        round(result.seconds, 3),
        str(out or result.entry.directory),
        json.loads(facts.get(FACT_LAYERS, "{}")),
        dict(fused.layers),
        fused.not_told,
        _memory(result, bundle, limits),
        tuple(json.loads(facts.get(FACT_WARNINGS, "[]"))),
    )


def _fused(backend: str, directory: Path) -> Fused:
    found = next((b for b in TRT_BACKENDS if b == backend), None)
    return Fused() if found is None else fused_layers(load_module(found), directory / PLAN)


def _memory(result: BuildResult, bundle: Bundle, limits: EngineLimits) -> dict[str, int | None]:
    facts, decoder, graph = result.entry.manifest.facts, bundle.decoder, bundle.graph
    gpu, limit = result.entry.manifest.key.recipe.gpu, {}
    if gpu is not None:
        sizes = TrtSizes.of(bundle)
        cache = sizes.cache_bytes(limits.rows)
        bank = sizes.bank + sizes.vectors_bytes(limits.rows)
        if gpu.workspace_bytes is not None:
            limit["workspace of a layer, at most"] = gpu.workspace_bytes
    else:
        cache = kv_bytes(decoder, limits.rows, limits.context)
        bank = bank_bytes(decoder, graph.max_bank_rank, graph=graph)
    return {
        "engine files": result.entry.bytes,
        "weights": _told(facts, FACT_WEIGHTS),
        "activations": _told(facts, FACT_ACTIVATION),
        **limit,
        "cache": cache,
        "adapters, at most": bank,
    }


def _told(facts: dict[str, str], name: str) -> int | None:
    return int(facts[name]) if name in facts else None
