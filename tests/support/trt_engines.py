"""TensorRT engines on the emulators: a "built" folder and what loads it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from remora_agent.engine.cache import CacheEntry, EngineManifest
from remora_agent.engine.protocol import Engine
from remora_agent.engine.recipe import BuildKey, Recipe, this_machine
from remora_agent.engine.trt import builder, files, sampling
from remora_agent.engine.trt.loading import load_on
from remora_agent.engine.trt.module import TrtBackend, TrtModule, api_of
from remora_agent.engine.trt.profiles import positions_of
from remora_agent.engine.trt.sampling import PLAN
from remora_agent.engine.trt.sampling_graph import sampling_graph
from remora_contract.bundle import (
    GRAPH_FILE,
    LEGACY_GRAPH_FILE,
    Bundle,
    GraphDialect,
    load_bundle,
)
from remora_contract.trt_memory import SamplingSize
from tests.support import trt_emulator
from tests.support.cuda_emulator import CudaEmulator
from tests.support.trt_emulator import TrtEmulator

VERSIONS: dict[TrtBackend, str] = {"tensorrt": TrtEmulator.__version__, "tensorrt_rtx": "1.7.1"}
WATCHED = 16  # tokens of a row
CHUNK = 5  # tokens of a prompt at once: most prompts of tests take several


def build(
    bundle_dir: Path,
    out: Path,
    rows: int = 4,
    tokens: int = CHUNK,
    shortlist: int = 0,
    dialect: GraphDialect | None = None,
) -> CacheEntry:
    """A folder as a build leaves it; `shortlist` 0: by a build without the sampling graph;
    `dialect`: of the bundle's second graph."""
    bundle = load_bundle(bundle_dir)
    graph = bundle.graph
    profiles = (files.Profile("prefill", 1, tokens), files.Profile("decode", rows, 1))
    facts = files.EngineFacts(profiles, graph.context, graph.max_bank_rank)
    written = files.written(facts)
    out.mkdir(parents=True, exist_ok=True)
    spans = [_span(p, bundle.decoder.vocab) for p in profiles]
    data = trt_emulator.plan(
        _rewritten(bundle_dir, bundle, out, dialect), spans, graph.max_bank_rank
    )
    (out / files.PLAN).write_bytes(data)
    if shortlist:
        vocab = bundle.decoder.vocab
        size = SamplingSize(vocab, min(shortlist, vocab), WATCHED)
        onnx.save(sampling_graph(vocab, shortlist), out / "sampling.onnx")
        span = {"rows": rows, "tokens": 1, "watched": WATCHED}
        (out / PLAN).write_bytes(trt_emulator.plan(out / "sampling.onnx", [span], 0))
        written |= sampling.written(size)
    recipe = Recipe("tensorrt", TrtEmulator.__version__, 1, 4, this_machine(), dialect=dialect)
    return CacheEntry(out, EngineManifest(BuildKey((), recipe), (), written))


def _span(profile: files.Profile, vocab: int) -> dict[str, int]:
    states, logits = positions_of(profile, vocab)
    return {"rows": profile.rows, "tokens": profile.tokens, "states": states, "logits": logits}


def _rewritten(bundle_dir: Path, bundle: Bundle, out: Path, dialect: GraphDialect | None) -> Path:
    """What TensorRT would be given; ONNX Runtime wants the weights in the same folder."""
    path = bundle_dir / (GRAPH_FILE if dialect is None else LEGACY_GRAPH_FILE)
    model = builder.check(path, bundle, dialect or bundle.graph.dialect)
    for file in bundle.files:
        if file.path == f"{GRAPH_FILE}.data" and not (out / file.path).exists():
            os.link(bundle_dir / file.path, out / file.path)
    onnx.save(model, out / "built.onnx")
    return out / "built.onnx"


@dataclass
class RunSize:
    rows: int = 4
    context: int | None = None
    overlap: str = "auto"


@dataclass
class Bench:
    """One emulated GPU and TensorRT, and the engines on them."""

    bundle_dir: Path
    entry: CacheEntry
    cuda: CudaEmulator = field(default_factory=CudaEmulator)
    backend: TrtBackend = "tensorrt"
    trt: TrtEmulator = field(init=False)

    def __post_init__(self) -> None:
        self.trt = TrtEmulator(self.cuda)

    def open(self, **changes: Any) -> Engine:
        module: Any = self.trt
        version = VERSIONS[self.backend]
        trt = TrtModule(self.backend, module, version, api_of(self.backend, version))
        bundle = load_bundle(self.bundle_dir)
        return load_on(self.cuda, trt, self.entry, bundle, RunSize(**changes))
