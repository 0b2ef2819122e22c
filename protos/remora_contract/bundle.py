"""bundle.json: what a bundle directory holds and what a device must know before it loads it.

    BUNDLE/
      bundle.json                 this document; its canonical digest is the bundle's identity
      model.onnx  model.onnx.data portable graph (docs/graph.md)
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

from remora_contract.digests import check_digest, digest_document, digest_file
from remora_contract.errors import ArtifactInvalid, DocumentInvalid
from remora_contract.strict import loads
from remora_contract.targets import Projection

BUNDLE_JSON = "bundle.json"
GRAPH_FILE = "model.onnx"
TOKENIZER_DIR = "tokenizer"
GENERATION_CONFIG = "generation_config.json"
GOLDEN_JSON = "golden.json"
FORMAT_VERSION = 1
_MAX_DOCUMENT_BYTES = 64 << 20

MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_HEAD_DIM = 4096
MAX_WIDTH = 1 << 20
MAX_VOCAB = 1 << 22
MAX_POSITION = 1 << 24
MAX_BANK_RANK = 4096
_LIMITS = {
    "layers": MAX_LAYERS,
    "hidden": MAX_WIDTH,
    "heads": MAX_HEADS,
    "kv_heads": MAX_HEADS,
    "head_dim": MAX_HEAD_DIM,
    "intermediate": MAX_WIDTH,
    "vocab": MAX_VOCAB,
}


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding. `scaling` is "none" or "llama3" (with its four numbers)."""

    theta: float
    scaling: Literal["none", "llama3"] = "none"
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_context: int | None = None


@dataclass(frozen=True)
class DecoderSpec:
    """The decoder's shape, independent of the family it came from."""

    family: str  # llama, qwen2, qwen3
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    norm_eps: float
    rope: RopeSpec
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    max_position: int = 0  # the checkpoint's own limit

    def __post_init__(self) -> None:
        """Bounds what a document from outside may make a reader compute or allocate."""
        for name, most in _LIMITS.items():
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}, outside 1 to {most}")

    def in_features(self, projection: Projection) -> int:
        """k of the projection's weight [n, k]."""
        if projection == "o":
            return self.heads * self.head_dim
        return self.intermediate if projection == "down" else self.hidden

    def out_features(self, projection: Projection) -> int:
        """n of the projection's weight [n, k]."""
        if projection == "q":
            return self.heads * self.head_dim
        if projection in ("k", "v"):
            return self.kv_heads * self.head_dim
        return self.intermediate if projection in ("gate", "up") else self.hidden


@dataclass(frozen=True)
class QuantSpec:
    """How projection weights are stored. `int4` is signed, symmetric, blocks along k."""

    kind: Literal["none", "int4"] = "none"
    block: int | None = None

    def __post_init__(self) -> None:
        if (self.kind == "int4") != (self.block is not None):
            raise ValueError(f"kind {self.kind} with a block of {self.block}")
        if self.block is not None and not 1 <= self.block <= MAX_WIDTH:
            raise ValueError(f"block is {self.block}, outside 1 to {MAX_WIDTH}")


@dataclass(frozen=True)
class GraphSpec:
    dialect: Literal["native"]
    dtype: Literal["float16", "float32"]  # of activations, cache, adapter inputs and scales
    context: int  # static capacity of the cache, tokens
    max_bank_rank: int  # sum of ranks of all resident adapters; 0: no bank
    opset: int
    quant: QuantSpec = field(default_factory=QuantSpec)

    def __post_init__(self) -> None:
        if not 1 <= self.context <= MAX_POSITION:
            raise ValueError(f"context is {self.context}, outside 1 to {MAX_POSITION}")
        if not 0 <= self.max_bank_rank <= MAX_BANK_RANK:
            raise ValueError(f"max_bank_rank is {self.max_bank_rank}, outside 0 to {MAX_BANK_RANK}")


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
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"format version {self.format_version} is not {FORMAT_VERSION}; "
                "export the checkpoint again with this version of remora-build"
            )
        check_digest(self.base_digest, "base_digest")
        check_listed(self.files, GRAPH_FILE)

    @property
    def digest(self) -> str:
        return digest_document(self)

    @property
    def bytes(self) -> int:
        return sum(f.size for f in self.files)

    def file(self, path: str) -> BundleFile | None:
        return next((f for f in self.files if f.path == path), None)


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
