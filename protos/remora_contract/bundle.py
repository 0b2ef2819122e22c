"""bundle.json: what a bundle directory holds and what a device must know before it loads it.

    BUNDLE/
      bundle.json                 this document; its canonical digest is the bundle's identity
      model.onnx  model.onnx.data portable graph (docs/graph.md)
      model.legacy.onnx           the same decoder in the legacy dialect, on the same data: only in
                                  format 3, whose model.onnx is native
      edgellm/                    instead of a graph, in format 4: an engine folder of TensorRT
                                  Edge-LLM as its own builder made it (docs/edgellm.md)
      tokenizer/tokenizer.json    and tokenizer_config.json, chat_template.jinja, ... as shipped
      generation_config.json      as shipped, when the checkpoint has one
      golden.json                 prompts with the tokens this very graph must answer

`base_digest` identifies the checkpoint's weights and architecture, not the bundle: bundles of one
checkpoint in several precisions share it, and adapters are bound to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from remora_contract.decoder import MAX_POSITION, DecoderSpec
from remora_contract.digests import check_digest, digest_document, digest_file
from remora_contract.errors import ArtifactInvalid, DocumentInvalid
from remora_contract.quant import QuantSpec as QuantSpec
from remora_contract.strict import loads
from remora_contract.targets import (
    EXPERT_GROUPS,
    MODEL_GROUPS,
    Group,
)

BUNDLE_JSON = "bundle.json"
GRAPH_FILE = "model.onnx"
LEGACY_GRAPH_FILE = "model.legacy.onnx"
TOKENIZER_DIR = "tokenizer"
GENERATION_CONFIG = "generation_config.json"
GOLDEN_JSON = "golden.json"
FORMAT_VERSION = 2
# Of bundles with LEGACY_GRAPH_FILE: whoever knows one graph only is told that this is none of his.
TWO_GRAPHS_VERSION = 3
# Of bundles with an engine folder and no graph.
EDGELLM_VERSION = 4
EDGELLM_DIR = "edgellm"
EDGELLM_CONFIG = f"{EDGELLM_DIR}/config.json"
EDGELLM_ENGINE = f"{EDGELLM_DIR}/llm.engine"
_VERSIONS = (FORMAT_VERSION, TWO_GRAPHS_VERSION, EDGELLM_VERSION)
# Which operators the graph is made of; docs/dialects.md says who takes which.
# "edgellm" is no graph of ours: an engine that TensorRT Edge-LLM runs whole.
GraphDialect = Literal["native", "legacy", "edgellm"]
_MAX_DOCUMENT_BYTES = 64 << 20

MAX_BANK_RANK = 4096


@dataclass(frozen=True)
class GraphSpec:
    dialect: GraphDialect
    dtype: Literal["float16", "float32"]  # of activations, cache, adapter inputs and scales
    context: int  # static capacity of the cache, tokens
    max_bank_rank: int  # sum of ranks of all resident adapters; 0: no bank
    opset: int
    quant: QuantSpec = field(default_factory=QuantSpec)
    # What the bank takes beyond the layers' dense projections, and beyond A and B.
    adapt: tuple[Literal["embed", "head", "experts"], ...] = ()
    dora: bool = False  # a factor [b, 1, n] a packed projection
    adapter_bias: bool = False  # a summand [b, 1, n] a packed projection
    # A longrope chooses by the input sequence_length; None: by the end of each call, as exports
    # did before there was one. Other ropes have no such input.
    sequence_length: Literal[True] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.context <= MAX_POSITION:
            raise ValueError(f"context is {self.context}, outside 1 to {MAX_POSITION}")
        if not 0 <= self.max_bank_rank <= MAX_BANK_RANK:
            raise ValueError(f"max_bank_rank is {self.max_bank_rank}, outside 0 to {MAX_BANK_RANK}")
        if not self.max_bank_rank and (self.adapt or self.dora or self.adapter_bias):
            raise ValueError("adapt, dora and adapter_bias need a bank (max_bank_rank)")
        if len(set(self.adapt)) != len(self.adapt):
            raise ValueError(f"adapt names a part twice: {', '.join(self.adapt)}")


def bank_groups(decoder: DecoderSpec, graph: GraphSpec, layer: int) -> tuple[Group, ...]:
    """The layer's packed projections for which the graph has adapter inputs, in its order."""
    if not graph.max_bank_rank:
        return ()
    groups = decoder.groups(layer)
    return tuple(g for g in groups if g not in EXPERT_GROUPS or "experts" in graph.adapt)


def model_bank_groups(graph: GraphSpec) -> tuple[Literal["embed", "head"], ...]:
    """Those outside the layers."""
    return tuple(g for g in MODEL_GROUPS if graph.max_bank_rank and g in graph.adapt)


@dataclass(frozen=True)
class BundleFile:
    path: str  # relative, "/" between parts
    size: int  # bytes
    digest: str

    def __post_init__(self) -> None:
        check_relative(self.path)
        check_digest(self.digest, self.path)
        if self.size < 0:
            raise ValueError(f"{self.path}: a size of {self.size} bytes")


@dataclass(frozen=True)
class SourceInfo:
    """Where the bundle came from, for people; no decision rests on it."""

    name: str
    model_type: str
    dtype: str


@dataclass(frozen=True)
class Bundle:
    format_version: int
    base_digest: str
    decoder: DecoderSpec
    graph: GraphSpec
    files: tuple[BundleFile, ...]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None
    source: SourceInfo
    exporter: str  # "remora 0.1.0"
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.format_version not in _VERSIONS:
            raise ValueError(
                f"format version {self.format_version} is not {FORMAT_VERSION}, "
                f"{TWO_GRAPHS_VERSION} or {EDGELLM_VERSION}; "
                "export the checkpoint again with this version of remora-build"
            )
        check_digest(self.base_digest, "base_digest")
        if self._check_edgellm():
            return
        check_listed(self.files, GRAPH_FILE)
        has_two = self.file(LEGACY_GRAPH_FILE) is not None
        if has_two != (self.format_version == TWO_GRAPHS_VERSION):
            raise ValueError(
                f"{LEGACY_GRAPH_FILE} belongs to format version {TWO_GRAPHS_VERSION}, and to no "
                "other; export the checkpoint again"
            )
        if has_two and self.graph.dialect != "native":
            raise ValueError(f"{GRAPH_FILE} beside {LEGACY_GRAPH_FILE} is {self.graph.dialect}")

    def _check_edgellm(self) -> bool:
        """Whether it holds an engine folder and no graph."""
        is_edgellm = self.format_version == EDGELLM_VERSION
        if is_edgellm != (self.graph.dialect == "edgellm"):
            raise ValueError(
                f"dialect edgellm belongs to format version {EDGELLM_VERSION}, and to no other; "
                "wrap the engine folder again with remora-build edgellm"
            )
        if is_edgellm:
            for needed in (EDGELLM_CONFIG, EDGELLM_ENGINE):
                check_listed(self.files, needed)
        return is_edgellm

    @property
    def dialects(self) -> tuple[GraphDialect, ...]:
        """Of its graphs; that of `graph` first."""
        has_two = self.format_version == TWO_GRAPHS_VERSION
        return (self.graph.dialect, "legacy") if has_two else (self.graph.dialect,)

    @property
    def stored(self) -> str:
        """How its weights are stored, where that is known."""
        return "unknown" if self.graph.dialect == "edgellm" else self.graph.quant.kind

    @property
    def digest(self) -> str:
        return digest_document(self)

    @property
    def bytes(self) -> int:
        return sum(f.size for f in self.files)

    def file(self, path: str) -> BundleFile | None:
        return next((f for f in self.files if f.path == path), None)


def is_graph_file(path: str) -> bool:
    """Whether a bundle's file is a graph, its weights or an engine: large, and read when built."""
    return path.startswith(GRAPH_FILE) or path in (LEGACY_GRAPH_FILE, EDGELLM_ENGINE)


def check_listed(files: tuple[BundleFile, ...], needed: str) -> None:
    """Raises ValueError when a path is listed twice or `needed` is not listed."""
    paths = [f.path for f in files]
    if len(set(paths)) != len(paths):
        raise ValueError("a file is listed twice")
    if needed not in paths:
        raise ValueError(f"{needed} is not among its files")


def check_relative(path: str) -> str:
    """A path from outside that may be joined to a directory. Raises DocumentInvalid."""
    parts = path.split("/")
    if (
        not path
        or path.startswith("/")
        or "\\" in path
        or "\0" in path
        or {"", ".", ".."} & set(parts)
    ):
        raise DocumentInvalid(f"unsafe path {path[:120]!r}")
    return path


def read_document(path: Path) -> bytes:
    """A document's bytes, bounded before they are read. Raises ArtifactInvalid."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise ArtifactInvalid(f"{path} is no file")
        if path.stat().st_size > _MAX_DOCUMENT_BYTES:
            raise ArtifactInvalid(f"{path}: larger than {_MAX_DOCUMENT_BYTES} bytes")
        return path.read_bytes()
    except FileNotFoundError as e:
        raise ArtifactInvalid(f"{path} does not exist") from e
    except OSError as e:
        raise ArtifactInvalid(f"{path} cannot be read: {e.strerror or e}") from e


def load_bundle(directory: Path) -> Bundle:
    """Parses DIRECTORY/bundle.json. Raises ArtifactInvalid, DocumentInvalid."""
    path = directory / BUNDLE_JSON
    if not path.exists():
        raise ArtifactInvalid(f"{directory} is no bundle: it has no {BUNDLE_JSON}")
    return loads(Bundle, read_document(path), str(path))


def verify_files(directory: Path, files: tuple[BundleFile, ...]) -> None:
    """Sizes first, then digests. Raises ArtifactInvalid naming the file."""
    for check in (_check_size, _check_digest):
        for f in files:
            path = directory / f.path
            try:
                check(path, f)
            except OSError as e:
                raise ArtifactInvalid(f"{path} cannot be read: {e.strerror or e}") from e


def _check_size(path: Path, file: BundleFile) -> None:
    if not path.is_file():
        raise ArtifactInvalid(f"{path} is missing")
    size = path.stat().st_size
    if size != file.size:
        raise ArtifactInvalid(f"{path} has {size} bytes, not {file.size}: truncated?")


def _check_digest(path: Path, file: BundleFile) -> None:
    if digest_file(path) != file.digest:
        raise ArtifactInvalid(f"{path} is damaged: its digest is not {file.digest}")
