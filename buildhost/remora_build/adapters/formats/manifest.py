"""remora.json: what an adapter in another runtime's format was made from, beside its files.

    DIR/
      remora.json    this document
      ...            the format's own files, all of them listed here

The other runtime does not read it. It lets --force replace only what Remora wrote, and gives back
what the format has no place for: the base, the scaling folded into B, PEFT's config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from remora_build.adapters.formats.carried import Carried
from remora_build.adapters.formats.registry import ForeignFormat, StoredDtype
from remora_build.adapters.sidecar import Factor, target_ranks
from remora_build.version import exporter_name
from remora_contract.adapter import TargetRank
from remora_contract.bundle import Bundle, BundleFile, read_document, verify_files
from remora_contract.digests import canonical_json, check_digest, digest_file
from remora_contract.errors import AdapterInvalid, Refused
from remora_contract.strict import loads
from remora_contract.targets import AdapterTarget

MANIFEST = "remora.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ForeignAdapter:
    format_version: int
    format: ForeignFormat
    base_digest: str
    dtype: StoredDtype
    tp_size: int
    targets: tuple[TargetRank, ...]
    files: tuple[BundleFile, ...]
    source_config: dict[str, Any]  # PEFT's adapter_config.json as it stood; empty: not known
    exporter: str

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"format version {self.format_version} is not {FORMAT_VERSION}; "
                "convert the adapter again with this version of remora-build"
            )
        check_digest(self.base_digest, "base_digest")
        if self.tp_size < 1 or not self.targets or not self.files:
            raise ValueError("tp_size, targets and files cannot be empty")

    @property
    def ranks(self) -> dict[AdapterTarget, int]:
        return {t.target: t.rank for t in self.targets}

    @property
    def bytes(self) -> int:
        return sum(f.size for f in self.files)


def load_manifest(directory: Path) -> ForeignAdapter:
    """Raises ArtifactInvalid, DocumentInvalid."""
    path = directory / MANIFEST
    return loads(ForeignAdapter, read_document(path), str(path))


def manifest_for(directory: Path, format: ForeignFormat, bundle: Bundle) -> ForeignAdapter | None:
    """The manifest beside files of `format`, or None when Remora did not write them.

    Raises ArtifactInvalid or DocumentInvalid (changed or damaged files), AdapterInvalid (another
    format), Refused (another base).
    """
    if not (directory / MANIFEST).exists():
        return None
    manifest = load_manifest(directory)
    if manifest.format != format:
        raise AdapterInvalid(
            f"{directory / MANIFEST} belongs to {manifest.format}, the files beside it to {format}"
        )
    if manifest.base_digest != bundle.base_digest:
        raise Refused(
            f"{directory} was made for base {manifest.base_digest}, the bundle is of "
            f"{bundle.base_digest}: give the bundle of its base with --base"
        )
    verify_files(directory, manifest.files)
    return manifest


def restore(
    manifest: ForeignAdapter, factors: Mapping[AdapterTarget, Factor], directory: Path
) -> Carried:
    """The factors with the scaling and the config the manifest kept. Raises AdapterInvalid when it
    tells of other targets or ranks than the files hold."""
    if {t: f.rank for t, f in factors.items()} != manifest.ranks:
        raise AdapterInvalid(f"{directory / MANIFEST} lists other targets than the files beside it")
    scaled = {t.target: replace(factors[t.target], scaling=t.scaling) for t in manifest.targets}
    return Carried(scaled, manifest.source_config)


def write_manifest(
    directory: Path,
    format: ForeignFormat,
    carried: Carried,
    *,
    base_digest: str,
    dtype: StoredDtype,
    tp_size: int,
) -> ForeignAdapter:
    """Writes remora.json over everything that lies in `directory`. Raises OSError."""
    files = tuple(
        BundleFile(p.name, p.stat().st_size, digest_file(p)) for p in sorted(directory.iterdir())
    )
    manifest = ForeignAdapter(
        format_version=FORMAT_VERSION,
        format=format,
        base_digest=base_digest,
        dtype=dtype,
        tp_size=tp_size,
        targets=target_ranks(carried.factors),
        files=files,
        source_config=dict(carried.source_config),
        exporter=exporter_name(),
    )
    (directory / MANIFEST).write_bytes(canonical_json(manifest))
    return manifest
