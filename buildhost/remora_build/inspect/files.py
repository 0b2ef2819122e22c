"""The files of an artifact directory, and whether they are what the document says."""

from __future__ import annotations

from pathlib import Path

from remora_build.inspect.render import Table, size_text
from remora_contract.bundle import BundleFile, verify_files
from remora_contract.digests import short


def files_table(files: tuple[BundleFile, ...]) -> Table:
    rows = tuple((f.path, size_text(f.size), short(f.digest)) for f in files)
    return Table("Files", ("path", "size", "sha256"), rows)


def verified_text(directory: Path, files: tuple[BundleFile, ...], verify: bool) -> str:
    """Raises ArtifactInvalid naming the damaged file when `verify` is given."""
    if not verify:
        return "not checked (--verify hashes every file)"
    verify_files(directory, files)
    return f"all {len(files)} files match their digests"
