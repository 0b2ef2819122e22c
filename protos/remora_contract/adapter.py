"""adapter.json: a converted adapter (the sidecar), beside adapter.safetensors.

    ADAPTER/
      adapter.json            this document; its canonical digest is the adapter's identity
      adapter.safetensors     layers.{l}.{projection}.a [k, r] and .b [r, n], float16 or float32;
                              .m [n] of a DoRA target and .bias [n] of one with a bias, float32

Scale (alpha/r, alpha/sqrt(r), patterns) is folded into B in fp32 before the cast. A target's part
is  y = m * (x W + (x a) b) + base bias + bias,  m being 1 and bias 0 where there is none. Targets
on experts have a [experts, k, r] and b [experts, r, n].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from remora_contract.bundle import BundleFile, check_listed, read_document
from remora_contract.decoder import MAX_LAYERS
from remora_contract.digests import check_digest, digest_document
from remora_contract.errors import ArtifactInvalid
from remora_contract.strict import loads
from remora_contract.targets import ALL_PROJECTIONS, AdapterTarget, Projection

ADAPTER_JSON = "adapter.json"
WEIGHTS_FILE = "adapter.safetensors"
FORMAT_VERSION = 2
MAX_RANK = 1 << 20
MAX_INVOCATION_TOKENS = 4096


@dataclass(frozen=True)
class TargetRank:
    layer: int
    projection: Projection
    rank: int  # 0: the target has no factors, only a bias
    scaling: float  # what was folded into B
    dora: bool = False  # has .m
    bias: bool = False  # has .bias

    def __post_init__(self) -> None:
        if not 0 <= self.rank <= MAX_RANK or not 0 <= self.layer < MAX_LAYERS:
            raise ValueError(f"rank must be 0 to {MAX_RANK} and layer 0 to {MAX_LAYERS - 1}")
        if self.rank == 0 and (self.dora or not self.bias):
            raise ValueError(f"{self.target.name()} has no factors and no bias of its own")

    @property
    def target(self) -> AdapterTarget:
        return AdapterTarget(self.layer, self.projection)


@dataclass(frozen=True)
class Adapter:
    format_version: int
    base_digest: str
    dtype: Literal["float16", "float32"]
    targets: tuple[TargetRank, ...]
    files: tuple[BundleFile, ...]
    source_config: dict[str, Any]  # PEFT's adapter_config.json verbatim
    exporter: str
    # Activated LoRA: active from the last occurrence of these tokens in the prompt on.
    invocation_tokens: tuple[int, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"format version {self.format_version} is not {FORMAT_VERSION}; "
                "convert the adapter again with this version of remora-build"
            )
        check_digest(self.base_digest, "base_digest")
        check_listed(self.files, WEIGHTS_FILE)
        if not self.targets:
            raise ValueError("an adapter without targets changes nothing")
        if len({t.target for t in self.targets}) != len(self.targets):
            raise ValueError("a target is listed twice")
        if len(self.invocation_tokens) > MAX_INVOCATION_TOKENS:
            raise ValueError(f"more than {MAX_INVOCATION_TOKENS} invocation tokens")
        if any(token < 0 for token in self.invocation_tokens):
            raise ValueError("an invocation token is negative")

    @cached_property
    def digest(self) -> str:
        return digest_document(self)

    @property
    def bytes(self) -> int:
        return sum(f.size for f in self.files)

    @property
    def rank(self) -> int:
        """The most bank columns it takes in any projection."""
        return max(t.rank for t in self.targets)

    @property
    def dora(self) -> bool:
        """Whether it rescales outputs: it then answers alone, with weight 1, or not at all."""
        return any(t.dora for t in self.targets)

    def rank_of(self, projection: Projection) -> int:
        """Largest rank over the layers for this projection; 0 when it is not adapted."""
        return max((t.rank for t in self.targets if t.projection == projection), default=0)

    def projections(self) -> tuple[Projection, ...]:
        found = {t.projection for t in self.targets}
        return tuple(p for p in ALL_PROJECTIONS if p in found)


def load_adapter(directory: Path) -> Adapter:
    """Parses DIRECTORY/adapter.json. Raises ArtifactInvalid, DocumentInvalid."""
    path = directory / ADAPTER_JSON
    if not path.exists():
        raise ArtifactInvalid(
            f"{directory} is no converted adapter: it has no {ADAPTER_JSON}; "
            "run remora-build adapter PEFT_DIR OUT --base BUNDLE"
        )
    return loads(Adapter, read_document(path), str(path))
