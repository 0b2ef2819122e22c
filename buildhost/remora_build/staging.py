"""A directory that appears whole or not at all: written beside its place, synced, renamed.

Owns temporary names, replacing and cleaning up; knows nothing of what is written.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from remora_contract.errors import Conflict, Exhausted, Refused, RemoraError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def staged_directory(out: Path, *, marker: str, replace: bool) -> Iterator[Path]:
    """Yields an empty directory beside `out`; leaving the block without an error makes it `out`.

    An existing `out` is a Conflict unless `replace` is given and `out` is empty or holds the file
    `marker`, which says that it is one of ours: nothing else is ever deleted. On an error the
    temporary directory is removed and `out` is as before. Raises Conflict, Exhausted, Refused.
    """
    _check_free(out, marker, replace)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.new-", dir=out.parent))
    except OSError as e:
        raise write_failed(out, e) from e
    try:
        staging.chmod(0o755)
        yield staging
        _sync_tree(staging)
        _put_in_place(staging, out)
    except OSError as e:
        raise write_failed(out, e) from e
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_failed(path: Path, error: OSError) -> RemoraError:
    """The error to raise when writing below `path` failed: Exhausted on a full disk."""
    if error.errno in _FULL:
        return Exhausted(f"no space left while writing {path}; free some and run it again")
    return Refused(f"{path} cannot be written: {error.strerror or error}")


def sync_directory(path: Path, fsync: Callable[[int], None] = os.fsync) -> None:
    """Makes renames inside `path` durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fsync(handle)
    finally:
        os.close(handle)


def _check_free(out: Path, marker: str, replace: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not replace:
        raise Conflict(f"{out} exists already; give --force to replace it")
    if not out.is_dir() or (any(out.iterdir()) and not (out / marker).is_file()):
        raise Conflict(f"{out} has no {marker}, so it is not replaced; choose another place")


def _sync_tree(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with path.open("rb") as f:
                os.fsync(f.fileno())
        else:
            sync_directory(path)
    sync_directory(directory)


def _put_in_place(staging: Path, out: Path) -> None:
    old = staging.with_name(staging.name.replace(".new-", ".old-"))
    if out.exists():
        out.rename(old)
    try:
        staging.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    sync_directory(out.parent)
    shutil.rmtree(old, ignore_errors=True)
