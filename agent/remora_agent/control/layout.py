"""Names of what lies in the device's state directory (docs/control.md). Owns the lock on it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from remora_agent.update_locks import FILE_NAME
from remora_contract.artifact import check_name
from remora_contract.digests import hex_of
from remora_contract.errors import Refused


@dataclass(frozen=True)
class StateLayout:
    root: Path

    @property
    def identity(self) -> Path:
        return self.root / "identity"

    @property
    def cas(self) -> Path:
        return self.root / "cas"

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def engines(self) -> Path:
        return self.root / "engines"

    @property
    def releases(self) -> Path:
        return self.root / "releases"

    @property
    def database(self) -> Path:
        return self.root / "state.db"

    @property
    def kept_log(self) -> Path:
        return self.root / "logs" / "agent.jsonl"

    @property
    def update_locks(self) -> Path:
        return self.root / FILE_NAME

    @property
    def current(self) -> Path:
        return self.root / "current"

    def artifact(self, digest: str) -> Path:
        return self.artifacts / hex_of(digest)

    def release(self, release_id: str) -> Path:
        return self.releases / f"{check_name(release_id, 'release id')}.json"

    def create(self) -> None:
        """Makes the directories that are missing. Raises Refused when it may not."""
        try:
            for path in (self.root, self.cas, self.artifacts, self.engines, self.releases):
                path.mkdir(mode=0o750, parents=True, exist_ok=True)
        except OSError as e:
            raise Refused(
                f"state directory {self.root} cannot be made: {e.strerror}; run as the service's "
                "user or choose another state_dir"
            ) from e


@contextmanager
def exclusive(layout: StateLayout) -> Iterator[None]:
    """One agent per state directory. Raises Refused when another one holds it."""
    descriptor = os.open(layout.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise Refused(
                f"another remora-agent runs with {layout.root}; stop it, or give this one its own "
                "state_dir"
            ) from e
        yield
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Whole new content or the old one, also after a power cut: temporary file, fsync, rename."""
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    temporary.rename(path)
    sync_directory(path.parent)


def point_link(link: Path, target: str) -> None:
    """Makes `link` a symbolic link to `target`, replacing the old one atomically."""
    if link.is_symlink() and str(link.readlink()) == target:
        return
    temporary = link.with_name(f".{link.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.rename(link)
    sync_directory(link.parent)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
