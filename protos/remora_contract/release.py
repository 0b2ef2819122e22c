"""A release: what a device is to run, declaratively. Immutable; its digest is its identity."""

from __future__ import annotations

from dataclasses import dataclass, field

from remora_contract.artifact import check_name
from remora_contract.digests import check_digest, digest_document, short

FORMAT_VERSION = 1


@dataclass(frozen=True)
class ReleaseAdapter:
    """An adapter by name; the name's alias on the device points to this revision."""

    name: str
    revision: str
    digest: str

    def __post_init__(self) -> None:
        check_name(self.name, "adapter name")
        check_name(self.revision, "adapter revision")
        check_digest(self.digest, f"adapter {self.name}")


@dataclass(frozen=True)
class WeightedName:
    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class ReleaseUseCase:
    name: str
    adapters: tuple[WeightedName, ...]

    def __post_init__(self) -> None:
        check_name(self.name, "use case name")
        if not self.adapters:
            raise ValueError(f"use case {self.name} names no adapter")


@dataclass(frozen=True)
class SamplingDefaults:
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class Constraints:
    """What a device must have, checked before anything is shipped to it."""

    min_memory_bytes: int | None = None
    min_agent_version: str | None = None
    backends: tuple[str, ...] = ()


@dataclass(frozen=True)
class Release:
    format_version: int
    name: str
    bundle: str  # digest
    adapters: tuple[ReleaseAdapter, ...] = ()
    use_cases: tuple[ReleaseUseCase, ...] = ()
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    constraints: Constraints = field(default_factory=Constraints)

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(f"format version {self.format_version} is not {FORMAT_VERSION}")
        check_name(self.name, "release name")
        check_digest(self.bundle, "bundle")
        names = [a.name for a in self.adapters]
        if len(set(names)) != len(names):
            raise ValueError("an adapter name is listed twice")
        for use_case in self.use_cases:
            for used in use_case.adapters:
                if used.name not in names:
                    raise ValueError(f"use case {use_case.name} names unknown adapter {used.name}")

    @property
    def digest(self) -> str:
        return digest_document(self)

    @property
    def release_id(self) -> str:
        """`name-<first 12 hex digits of the digest>`: short to type, still unique."""
        return f"{self.name}-{short(self.digest)}"

    def artifact_digests(self) -> tuple[str, ...]:
        return (self.bundle, *(a.digest for a in self.adapters))
