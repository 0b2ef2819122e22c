"""What makes two builds the same build: the key of the engine cache, as data.

An option belongs here only when the built bytes depend on it. Rows, context and threads do not
change what ONNX Runtime loads, so engines of any size share one build. A TensorRT engine is made
for rows, lengths and a GPU: `GpuBuild`.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from remora_agent.engine.prefill import PrefillChoice
from remora_contract.bundle import (
    GOLDEN_JSON,
    GRAPH_FILE,
    LEGACY_GRAPH_FILE,
    Bundle,
    BundleFile,
    GraphDialect,
)
from remora_contract.digests import digest_bytes, digest_document
from remora_contract.engine import EngineKey
from remora_contract.errors import ArtifactInvalid
from remora_contract.strict import plain

_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Machine:
    """Prepacked weights fit one processor's kernels: its architecture and instruction sets."""

    architecture: str
    features: str  # digest of the sorted feature names


@dataclass(frozen=True)
class GpuBuild:
    """What a TensorRT engine was made for. Of an engine that fits any of `processors` nothing
    tells where it was built: device, driver, power mode and workspace are None."""

    processors: tuple[int, ...]  # compute capabilities, ascending: 86 is 8.6
    rows: int
    prefill_tokens: int  # of a prompt in one call
    device: str | None = None  # GPU and board
    driver: str | None = None
    power_mode: str | None = None
    workspace_bytes: int | None = None  # most that one layer may take; None: no limit was set


@dataclass(frozen=True)
class Recipe:
    backend: str
    backend_version: str
    rewrite_version: int  # of our own builder
    # Of int4 products: 4 quantizes activations to int8, 1 keeps float32, 0: as the graph says.
    accuracy_level: int
    machine: Machine
    prefill: PrefillChoice = "plain"  # whether the build also makes, and holds to account, int8
    gpu: GpuBuild | None = None  # None, and so not in the key: built for a processor
    # Digest of what the backend says of its own build: one version is packaged more than once.
    backend_build: str | None = None
    # Only of an engine that is built from the second of a bundle's graphs.
    dialect: GraphDialect | None = None


@dataclass(frozen=True)
class BuildKey:
    files: tuple[BundleFile, ...]
    recipe: Recipe

    @property
    def digest(self) -> str:
        return digest_document(self)

    def plain(self) -> EngineKey:
        """As it travels: the same digest."""
        return EngineKey(self.files, plain(self.recipe))


def build_key(bundle: Bundle, recipe: Recipe) -> BuildKey:
    """Raises ArtifactInvalid when the bundle lists no graph."""
    return BuildKey(build_files(bundle, recipe), recipe)


def build_files(bundle: Bundle, recipe: Recipe) -> tuple[BundleFile, ...]:
    """What a build reads: the graph, which also of a second graph says whose it is, and the golden
    prompts where they decide. Raises ArtifactInvalid when there is no graph."""
    second = () if recipe.dialect is None else (_second_graph(bundle),)
    golden = bundle.file(GOLDEN_JSON) if recipe.prefill != "plain" else None
    return (*graph_files(bundle), *second, *([golden] if golden is not None else []))


def graph_file(recipe: Recipe) -> str:
    """Which of the bundle's graphs is built."""
    return GRAPH_FILE if recipe.dialect is None else LEGACY_GRAPH_FILE


def dialect_of(bundle: Bundle, recipe: Recipe) -> GraphDialect:
    return recipe.dialect or bundle.graph.dialect


def _second_graph(bundle: Bundle) -> BundleFile:
    file = bundle.file(LEGACY_GRAPH_FILE)
    if file is None:
        raise ArtifactInvalid(
            f"bundle.json lists no {LEGACY_GRAPH_FILE}; export the checkpoint with --dialect both"
        )
    return file


def graph_files(bundle: Bundle) -> tuple[BundleFile, ...]:
    """The graph and its weights, by path. Raises ArtifactInvalid when there is none."""
    files = sorted((f for f in bundle.files if f.path.startswith(GRAPH_FILE)), key=lambda f: f.path)
    if bundle.file(GRAPH_FILE) is None:
        raise ArtifactInvalid(f"bundle.json lists no {GRAPH_FILE}; export the checkpoint again")
    return tuple(files)


def this_machine() -> Machine:
    return Machine(platform.machine(), cpu_features(_cpu_info()))


def cpu_features(cpu_info: str) -> str:
    """Digest of the instruction sets that every core of /proc/cpuinfo has."""
    lines = (line.partition(":") for line in cpu_info.splitlines())
    cores = [
        set(v.split()) for name, _, v in lines if name.strip().lower() in ("flags", "features")
    ]
    common = set.intersection(*cores) if cores else set()
    return digest_bytes(" ".join(sorted(common)).encode())


def _cpu_info() -> str:
    return _CPU_INFO.read_text() if _CPU_INFO.exists() else platform.processor()
