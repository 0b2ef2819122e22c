"""Small, careful file work: locks between processes, durability, full disks named as such."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from remora_contract.errors import Cancelled, Exhausted, InternalFault, RemoraError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_POLL_S = 0.1


def disk_error(path: Path, error: OSError) -> RemoraError:
    """Exhausted for a full disk, InternalFault for anything else, both naming the path."""
    if error.errno in _FULL:
        return Exhausted(
            f"no space left for {path}: free some, or lower the engine cache's byte limit"
        )
    return InternalFault(f"{error.filename or path}: {error.strerror or error}")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns OSError into an error of the tree that names `path`."""
    try:
        yield
    except OSError as e:
        raise disk_error(path, e) from e


@contextmanager
def lock_file(path: Path, cancelled: Callable[[], bool]) -> Iterator[None]:
    """Holds an exclusive lock between processes, waiting for it. Raises Cancelled."""
    while True:
        with try_lock(path) as taken:
            if taken:
                yield
                return
        if cancelled():
            raise Cancelled(f"cancelled while another process held {path}")
        time.sleep(_POLL_S)


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """True while this process holds the lock, False at once when another does."""
    with disk_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def sync_tree(directory: Path, recurse: bool = True) -> None:
    """Makes a folder and, unless `recurse` is off, every file below durable."""
    paths = [p for p in directory.rglob("*") if not p.is_symlink()] if recurse else []
    for path in (*paths, directory):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
