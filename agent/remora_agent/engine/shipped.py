"""An engine that was built elsewhere, taken into the cache: verified, proven, then named.

Nothing native reads a byte before its digest was checked, and the cache never holds a shipped
engine that has not answered the golden prompts: interrupted anywhere, it is as if none had come.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from remora_agent.engine.cache import MANIFEST, CacheEntry, EngineCache, read_entry
from remora_agent.engine.disk import disk_errors
from remora_agent.engine.recipe import BuildKey
from remora_contract.bundle import verify_files
from remora_contract.digests import canonical_json, short
from remora_contract.errors import InvalidInput

log = logging.getLogger(__name__)


def fitting(directories: Sequence[Path], keys: Sequence[BuildKey]) -> tuple[Path, BuildKey] | None:
    """The first folder whose engine has exactly the first of these keys, or the second, and so on.
    Unreadable ones are passed over."""
    found = [(d, _key_of(d)) for d in directories]
    return next(((d, key) for key in keys for d, own in found if own == key.digest), None)


def _key_of(directory: Path) -> str | None:
    try:
        return read_entry(directory).manifest.key.digest
    except InvalidInput as e:
        log.warning("engine.unreadable", extra={"path": str(directory), "reason": str(e)})
        return None


def take_shipped(
    directory: Path,
    key: BuildKey,
    cache: EngineCache,
    prove: Callable[[CacheEntry], None],
    cancelled: Callable[[], bool],
) -> CacheEntry:
    """The engine in `directory` under its key in the cache. `prove` raises what keeps it out.

    Raises ArtifactInvalid (a file is damaged), Exhausted (disk), Cancelled, and what `prove` does.
    """
    with cache.building(key.digest, cancelled) as staging:
        if entry := cache.find(key.digest):  # another process built it meanwhile
            return entry
        manifest = read_entry(directory).manifest
        out = staging / "engine"
        with disk_errors(staging):
            out.mkdir()
            for file in manifest.files:
                _link(directory / file.path, out / file.path)
            (out / MANIFEST).write_bytes(canonical_json(manifest))
        verify_files(out, manifest.files)
        prove(CacheEntry(out, manifest))
        entry = cache.adopt(out, manifest)
    log.info("engine.taken", extra={"key": short(key.digest), "bytes": entry.bytes})
    return entry


def _link(source: Path, target: Path) -> None:
    """No second copy where both lie on one file system. Raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError as e:
        if e.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
            raise
        shutil.copyfile(source, target)
