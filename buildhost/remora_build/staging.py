"""A directory that appears whole or not at all: written beside its place, synced, renamed.

Owns temporary names, replacing and cleaning up; knows nothing of what is written.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from remora_contract.bundle import read_document
from remora_contract.errors import Conflict, Exhausted, Refused, RemoraError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def staged_directory(out: Path, *, marker: str, replace: bool) -> Iterator[Path]:
    """Yields an empty directory beside `out`; leaving the block without an error makes it `out`.

    An existing `out` is a Conflict, at the beginning and at the end, unless `replace` is given and
    `out` is empty or one of ours: it holds the document `marker` and nothing that this does not
    list, so nothing else is ever deleted. On an error, Ctrl-C or SIGTERM the temporary directory is
    removed and `out` is as before; only a kill leaves `.OUT.new-…` behind (or, in the instant of
    replacing, the old one as `.OUT.old-…`). Raises Conflict, Exhausted, Refused.
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
        _check_free(out, marker, replace)  # another may have finished meanwhile
        _put_in_place(staging, out)
    except OSError as e:
        raise write_failed(out, e) from e
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_failed(path: Path, error: OSError) -> RemoraError:
    """The error to raise when writing below `path` failed: Exhausted on a full disk."""
    if error.errno in _FULL:
        return Exhausted(f"no space left while writing {path}; free some and run it again")
    which = f" ({error.filename})" if error.filename not in (None, str(path)) else ""
    return Refused(f"{path} cannot be written: {error.strerror or error}{which}")


def sync_directory(path: Path, fsync: Callable[[int], None] = os.fsync) -> None:
    """Makes renames inside `path` durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fsync(handle)
    finally:
        os.close(handle)


def _check_free(out: Path, marker: str, replace: bool) -> None:
    if out.is_symlink():
        raise Conflict(f"{out} is a symbolic link; name the directory itself")
    if not out.exists():
        return
    if not replace:
        raise Conflict(f"{out} exists already; give --force to replace it")
    if out.is_dir() and not any(out.iterdir()):
        return
    if not (out / marker).is_file():
        raise Conflict(f"{out} has no {marker}, so it is not replaced; choose another place")
    stranger = _stranger(out, marker)
    if stranger is not None:
        raise Conflict(f"{stranger} is not listed in {out / marker}: move it away, then replace")


def _stranger(out: Path, marker: str) -> Path | None:
    """A file below `out` that its document does not list; the document itself when it lists none.
    Read leniently: what an older version wrote may be replaced too."""
    try:
        listed = {entry["path"] for entry in json.loads(read_document(out / marker))["files"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        return out / marker
    files = (p for p in sorted(out.rglob("*")) if p.is_symlink() or not p.is_dir())
    return next((p for p in files if p.relative_to(out).as_posix() not in {marker, *listed}), None)


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
    finally:
        if old.exists() and not out.exists():  # interrupted between the two
            old.rename(out)
    sync_directory(out.parent)
    shutil.rmtree(old, ignore_errors=True)
