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
from remora_contract.quant import QuantSpec as QuantSpec
from remora_contract.strict import loads
from remora_contract.targets import (
    ATTENTION_GROUPS,
    DENSE_GROUPS,
    DOWN,
    EXPERT_GROUPS,
    MODEL_GROUPS,
    PARTS,
    SHARED_GROUPS,
    Group,
    Projection,
)

BUNDLE_JSON = "bundle.json"
GRAPH_FILE = "model.onnx"
TOKENIZER_DIR = "tokenizer"
GENERATION_CONFIG = "generation_config.json"
GOLDEN_JSON = "golden.json"
FORMAT_VERSION = 2
# Which operators the graph is made of; docs/dialects.md says who takes which.
GraphDialect = Literal["native", "legacy"]
_MAX_DOCUMENT_BYTES = 64 << 20

MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_HEAD_DIM = 4096
MAX_WIDTH = 1 << 20
MAX_VOCAB = 1 << 22
MAX_POSITION = 1 << 24
MAX_BANK_RANK = 4096
MAX_EXPERTS = 4096
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
    """Rotary embedding of one kind of layer; docs/graph.md has the formula of each scaling.

    The angles of position p are p * f[i], f from theta and the scaling; cos and sin are multiplied
    by `attention_factor`. "longrope" divides f by `long_factors` for a row whose last position is
    past `original_context`, else by `short_factors`.
    """

    theta: float
    scaling: Literal["none", "linear", "llama3", "yarn", "longrope"] = "none"
    factor: float | None = None  # linear, llama3, yarn
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3
    original_context: int | None = None  # llama3, yarn, longrope
    dims: int | None = None  # leading dimensions of a head that turn; None: all of them
    interleaved: bool = False  # pairs are neighbours (2i, 2i + 1), not halves (i, i + d/2)
    beta_fast: float | None = None  # yarn
    beta_slow: float | None = None  # yarn
    truncate: bool = True  # yarn: whole dimensions bound the ramp
    attention_factor: float = 1.0  # yarn, longrope
    short_factors: tuple[float, ...] = ()  # longrope, one for each pair
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.dims is not None and not 2 <= self.dims <= MAX_HEAD_DIM:
            raise ValueError(f"dims is {self.dims}, outside 2 to {MAX_HEAD_DIM}")


@dataclass(frozen=True)
class LayerKind:
    """In what a layer differs from the plain one: full attention, the main rope, a dense MLP."""

    window: int | None = None  # a token sees so many positions, its own included; None: all
    rope: Literal["main", "local", "none"] = "main"
    experts: bool = False  # the MLP is the experts' mixture

    def __post_init__(self) -> None:
        if self.window is not None and not 1 <= self.window <= MAX_POSITION:
            raise ValueError(f"window is {self.window}, outside 1 to {MAX_POSITION}")


@dataclass(frozen=True)
class ExpertsSpec:
    """A mixture of experts. With p = softmax(x R) the `active` largest are chosen and

    y = sum_e p_e * mlp_e(x) [+ sigmoid(x g) * shared(x), or shared(x) without `shared_gate`]

    after `renormalize` has divided the chosen p by their sum.
    """

    count: int
    active: int
    intermediate: int
    renormalize: bool
    shared_intermediate: int | None = None
    shared_gate: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.active <= self.count <= MAX_EXPERTS:
            raise ValueError(f"{self.active} of {self.count} experts; at most {MAX_EXPERTS}")
        for width in (self.intermediate, self.shared_intermediate or 1):
            if not 1 <= width <= MAX_WIDTH:
                raise ValueError(f"an expert of width {width}, outside 1 to {MAX_WIDTH}")


@dataclass(frozen=True)
class QueryScale:
    """Queries at position p are multiplied by 1 + beta * ln(1 + floor(p / original_context))."""

    beta: float
    original_context: int

    def __post_init__(self) -> None:
        if not 1 <= self.original_context <= MAX_POSITION:
            raise ValueError(f"original_context is {self.original_context}")


@dataclass(frozen=True)
class DecoderSpec:
    """The decoder as arithmetic; `family` only says how a checkpoint names its tensors.

    block     pre       x += o(norm(x)); x += mlp(norm(x))
              post      x += norm(o(x)); x += norm(mlp(x))
              sandwich  x += norm(o(norm(x))); x += norm(mlp(norm(x)))
              parallel  x += o(norm(x)) + mlp(norm(x))      one norm for both
    qk_norm   head      over each head, one weight [head_dim]
              full      over all heads at once, weight [heads * head_dim]
              heads     over each head, a weight [heads, head_dim]
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    norm_eps: float
    rope: RopeSpec
    local_rope: RopeSpec | None = None  # of layers whose kind says "local"
    kinds: tuple[LayerKind, ...] = ()  # one a layer; empty: all plain
    experts: ExpertsSpec | None = None
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False  # of "layer" norms; never of q/k norms
    norm_plus_one: bool = False  # the checkpoint stores w - 1
    block: Literal["pre", "post", "sandwich", "parallel"] = "pre"
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["none", "head", "full", "heads"] = "none"
    query_scale: QueryScale | None = None
    attention_scale: float | None = None  # None: 1 / sqrt(head_dim)
    attention_softcap: float | None = None  # scores become cap * tanh(score / cap)
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what a block adds to the stream
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    tied_embeddings: bool = False
    max_position: int = 0  # the checkpoint's own limit

    def __post_init__(self) -> None:
        """Bounds what a document from outside may make a reader compute or allocate."""
        for name, most in _LIMITS.items():
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}, outside 1 to {most}")
        if self.kinds and len(self.kinds) != self.layers:
            raise ValueError(f"{len(self.kinds)} kinds for {self.layers} layers")
        if any(k.experts for k in self.kinds) and self.experts is None:
            raise ValueError("a layer has experts that are not described")
        if any(k.rope == "local" for k in self.kinds) and self.local_rope is None:
            raise ValueError("a layer has a local rope that is not described")

    def kind(self, layer: int) -> LayerKind:
        return self.kinds[layer] if self.kinds else LayerKind()

    def groups(self, layer: int) -> tuple[Group, ...]:
        """The packed projections of a layer, in the order in which they are computed."""
        if not self.kind(layer).experts or self.experts is None:
            return DENSE_GROUPS
        shared = SHARED_GROUPS if self.experts.shared_intermediate else ()
        return (*ATTENTION_GROUPS, *shared, *EXPERT_GROUPS)

    def projections(self, layer: int) -> tuple[Projection, ...]:
        return tuple(p for group in self.groups(layer) for p in PARTS[group])

    def copies(self, projection: Projection) -> int:
        """How many weights of this projection a layer has: one for each expert."""
        return self.experts.count if projection.startswith("expert_") and self.experts else 1

    def in_features(self, projection: Projection) -> int:
        """k of the projection's weight [n, k] (of one expert's)."""
        if projection == "o":
            return self.heads * self.head_dim
        if projection == "embed":
            return self.vocab
        return self._width(projection) if projection in DOWN else self.hidden

    def out_features(self, projection: Projection) -> int:
        """n of the projection's weight [n, k] (of one expert's)."""
        if projection == "q":
            return self.heads * self.head_dim
        if projection in ("k", "v"):
            return self.kv_heads * self.head_dim
        if projection == "head":
            return self.vocab
        if projection in ("o", "embed", *DOWN):
            return self.hidden
        return self._width(projection)

    def _width(self, projection: Projection) -> int:
        """Between an MLP's projections. Raises ValueError for experts that do not exist."""
        if not projection.startswith(("expert_", "shared_")):
            return self.intermediate
        experts = self.experts
        width = None
        if experts is not None:
            shared = projection.startswith("shared_")
            width = experts.shared_intermediate if shared else experts.intermediate
        if width is None:
            raise ValueError(f"this decoder has no {projection}")
        return width


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
