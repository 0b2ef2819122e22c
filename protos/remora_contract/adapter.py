"""adapter.json: a converted adapter (the sidecar), beside adapter.safetensors.

    ADAPTER/
      adapter.json            this document; its canonical digest is the adapter's identity
      adapter.safetensors     layers.{l}.{projection}.a [k, r] and .b [r, n], float16 or float32

Scale (alpha/r, alpha/sqrt(r), patterns) is folded into B in fp32 before the cast.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from remora_contract.bundle import MAX_LAYERS, BundleFile, check_listed, read_document
from remora_contract.digests import check_digest, digest_document
from remora_contract.errors import ArtifactInvalid
from remora_contract.strict import loads
from remora_contract.targets import PROJECTIONS, AdapterTarget, Projection

ADAPTER_JSON = "adapter.json"
WEIGHTS_FILE = "adapter.safetensors"
FORMAT_VERSION = 1
MAX_RANK = 1 << 20


@dataclass(frozen=True)
class TargetRank:
    layer: int
    projection: Projection
    rank: int
    scaling: float  # what was folded into B

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MAX_RANK or not 0 <= self.layer < MAX_LAYERS:
            raise ValueError(f"rank must be 1 to {MAX_RANK} and layer 0 to {MAX_LAYERS - 1}")

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

    @property
    def digest(self) -> str:
        return digest_document(self)

    @property
    def bytes(self) -> int:
        return sum(f.size for f in self.files)

    @property
    def rank(self) -> int:
        """The most bank columns it takes in any projection."""
        return max(t.rank for t in self.targets)

    def rank_of(self, projection: Projection) -> int:
        """Largest rank over the layers for this projection; 0 when it is not adapted."""
        return max((t.rank for t in self.targets if t.projection == projection), default=0)

    def projections(self) -> tuple[Projection, ...]:
        return tuple(p for p in PROJECTIONS if self.rank_of(p))


def load_adapter(directory: Path) -> Adapter:
    """Parses DIRECTORY/adapter.json. Raises ArtifactInvalid, DocumentInvalid."""
    path = directory / ADAPTER_JSON
    if not path.exists():
        raise ArtifactInvalid(
            f"{directory} is no converted adapter: it has no {ADAPTER_JSON}; "
            "run remora-build adapter PEFT_DIR OUT --base BUNDLE"
        )
    return loads(Adapter, read_document(path), str(path))
