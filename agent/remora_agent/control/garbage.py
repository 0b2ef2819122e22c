"""What may leave the disk: everything that no root needs. Roots are the committed, previous,
assigned and pinned releases; a release document that cannot be read keeps everything.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

from remora_agent.control.activation import Record
from remora_agent.control.held_chunks import SUFFIX
from remora_agent.control.layout import StateLayout
from remora_agent.control.releases import read_release
from remora_contract.device_phase import Phase
from remora_contract.digests import hex_of
from remora_contract.errors import InvalidInput

log = logging.getLogger(__name__)


def root_releases(record: Record, pinned: Iterable[str]) -> frozenset[str]:
    """Release ids that keep their files."""
    named = (record.desired.release_id, record.committed, record.previous, *pinned)
    return frozenset(r for r in named if r is not None)


def collect(layout: StateLayout, record: Record, pinned: Iterable[str]) -> int:
    """Removes unreachable artifacts, documents and, once nothing is under way, left-over chunks.

    Returns how many entries went. Engines belong to their cache, which knows what a build key is.
    """
    roots = root_releases(record, pinned)
    kept = _kept_artifacts(layout, roots)
    if kept is None:
        return 0
    doomed = [p for p in layout.releases.glob("*.json") if p.stem not in roots]
    doomed += [p for p in layout.artifacts.iterdir() if _artifact_name(p) not in kept]
    if record.phase in (Phase.COMMITTED, Phase.UNASSIGNED):
        doomed += layout.cas.iterdir()
    for path in doomed:
        _remove(path)
    if doomed:
        log.info("garbage.collected", extra={"entries": len(doomed)})
    return len(doomed)


def _kept_artifacts(layout: StateLayout, roots: Iterable[str]) -> set[str] | None:
    present = [r for r in roots if layout.release(r).exists()]
    try:
        releases = [read_release(layout, r) for r in present]
    except InvalidInput as e:
        log.warning("garbage.skipped", extra={"cause": str(e)})
        return None
    return {hex_of(d) for r in releases for d in r.all_digests()}


def _artifact_name(path: Path) -> str:
    """`<hex>`, its `.<hex>.manifest` or, while staging, `.<hex>.partial`."""
    return path.name.removeprefix(".").removesuffix(".partial").removesuffix(SUFFIX)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
