"""The decoder as arithmetic, whatever checkpoint it comes from: what bundle.json says of it.

Owns shapes and their bounds; knows no files, no quantization and no dialect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from remora_contract.targets import (
    ATTENTION_GROUPS,
    DENSE_GROUPS,
    DOWN,
    EXPERT_GROUPS,
    PARTS,
    SHARED_GROUPS,
    Group,
    Projection,
)

MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_HEAD_DIM = 4096
MAX_WIDTH = 1 << 20
MAX_VOCAB = 1 << 22
MAX_POSITION = 1 << 24
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
    by `attention_factor`. "longrope" divides f by `long_factors` in a sequence that is longer than
    `original_context`, from its first token on, else by `short_factors`.
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

    def switches(self, context: int) -> int | None:
        """Tokens of the longest sequence that a longrope turns by its short factors; None where a
        cache of `context` holds no longer one, or for another rope."""
        original = self.original_context if self.scaling == "longrope" else None
        return None if original is None or original >= context else original


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
        if self.local_rope is not None and self.local_rope.scaling == "longrope":
            raise ValueError("a local rope is no longrope: rows switch at one length")

    def switches(self, context: int) -> int | None:
        """As `RopeSpec.switches`, of the main rope."""
        return self.rope.switches(context)

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
