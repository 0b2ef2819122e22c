"""A folder of keys that are written once, durably and whole: tmp -> fsync -> rename -> fsync dir.

Owns crash safety on a local filesystem; knows nothing of artifacts. `fsync` and `replace` are
arguments so that tests can pull the power at each of them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from remora_build.staging import sync_directory, write_failed
from remora_contract.bundle import read_document
from remora_contract.errors import Refused

_TOP = ("cas", "manifests", "names")
_TEMPORARY = "tmp"
_LOCK = ".publish.lock"


class LocalStore:
    """Keys are relative paths with "/". What `put` wrote survives a power cut after `flush`."""

    def __init__(
        self,
        root: Path,
        *,
        fsync: Callable[[int], None] = os.fsync,
        replace: Callable[[Path, Path], None] = os.replace,
    ) -> None:
        self.root = root
        self._fsync = fsync
        self._replace = replace
        self._unsynced: set[Path] = set()

    def size(self, key: str) -> int | None:
        """Bytes stored under the key; None when there is nothing."""
        try:
            return (self.root / key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, key: str) -> bytes:
        """A document, bounded. Raises ArtifactInvalid."""
        return read_document(self.root / key)

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Raises Exhausted on a full disk, Refused when the folder cannot be written."""
        path = self.root / key
        temporary = self.root / _TEMPORARY / path.name
        try:
            self._make_directory(path.parent)
            with temporary.open("wb") as f:
                f.write(data)
                f.flush()
                self._fsync(f.fileno())
            self._replace(temporary, path)
        except OSError as e:
            temporary.unlink(missing_ok=True)
            raise write_failed(path, e) from e
        self._unsynced.add(path.parent)

    def flush(self) -> None:
        """Makes every `put` so far durable, before something refers to it."""
        try:
            for directory in sorted(self._unsynced):
                sync_directory(directory, self._fsync)
        except OSError as e:
            raise write_failed(self.root, e) from e
        self._unsynced.clear()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keeps other publishers out: they wait. Raises Refused when this is no repository.

        A temporary folder that is still there means that a publisher was killed: what it renamed
        may be visible and yet not durable, so everything is synced before it is relied on.
        """
        self._check_ours()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with (self.root / _LOCK).open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._recover()
                yield
                self.flush()
                shutil.rmtree(self.root / _TEMPORARY, ignore_errors=True)
        except OSError as e:
            raise write_failed(self.root, e) from e

    def _recover(self) -> None:
        temporary = self.root / _TEMPORARY
        if temporary.exists():
            shutil.rmtree(temporary)
            for top in _TOP:
                self._unsynced.update(p for p in (self.root / top).rglob("*") if p.is_dir())
                self._unsynced.update(p for p in [self.root / top] if p.is_dir())
            self._unsynced.add(self.root)
            self.flush()
        temporary.mkdir()

    def _check_ours(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise Refused(f"{self.root} is a file, not a repository folder")
        # Listed once: another publisher may be making the folders at this moment.
        found = {p.name for p in self.root.iterdir()} if self.root.is_dir() else set()
        strangers = sorted(found - {_LOCK, _TEMPORARY})
        if strangers and not found & set(_TOP):
            raise Refused(
                f"{self.root} is not empty and no repository (it holds {strangers[0]}); "
                "give an empty folder or a new name"
            )

    def _make_directory(self, path: Path) -> None:
        if path.is_dir():
            return
        self._make_directory(path.parent)
        path.mkdir(exist_ok=True)
        self._unsynced.add(path.parent)


def is_repository(root: Path) -> bool:
    return any((root / name).is_dir() for name in _TOP)
