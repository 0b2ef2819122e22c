"""A built engine copied out of the cache, to be published: `engine.json` and the files it names."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from remora_agent.engine.cache import CacheEntry
from remora_agent.engine.disk import disk_errors, sync_tree
from remora_contract.errors import Refused


def check_absent(out: Path) -> None:
    """Raises Refused when something is there that would have to be replaced, or no parent is."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise Refused(f"{out} exists; name a new directory")
    if not out.absolute().parent.is_dir():
        raise Refused(f"{out.absolute().parent} is no directory; make it first")


def take_along(entry: CacheEntry, out: Path) -> None:
    """Whole or not at all. Raises Refused, Exhausted."""
    check_absent(out)
    with disk_errors(out.absolute().parent):
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
        try:
            copied = staging / "engine"
            shutil.copytree(entry.directory, copied)
            sync_tree(copied)
            if out.exists():
                out.rmdir()
            copied.rename(out)
        finally:
            shutil.rmtree(staging)
