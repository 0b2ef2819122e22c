"""Chunks from the controller into cas/: resumed at the byte, bounded, hashed while written.

A chunk's name in cas/ promises that its bytes were verified: it appears by rename after
fsync. What is under way lies beside it as `.part` and survives a kill. Knows no files (`staging`).
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from remora_agent.control.download_share import DownloadShare
from remora_agent.control.interrupt import Interrupt
from remora_agent.control.layout import sync_directory
from remora_agent.control.pacing import Backoff, RateLimit
from remora_contract.artifact import Chunk, chunk_key
from remora_contract.digests import digest_bytes, short
from remora_contract.errors import (
    ArtifactInvalid,
    Cancelled,
    Exhausted,
    InternalFault,
    Refused,
    Unavailable,
)

log = logging.getLogger(__name__)
# What waiting may cure. Everything else ends the staging.
TRANSIENT = (Unavailable, Exhausted, Cancelled, InternalFault)
_MAX_BAD_ANSWERS = 3
_READ_BYTES = 1 << 20


class ChunkSource(Protocol):
    def manifest(self, digest: str) -> bytes: ...

    def fetch(self, chunk_digest: str, offset: int, length: int) -> Iterator[bytes]: ...


@dataclass(frozen=True)
class Pace:
    """Where time, randomness and the will to stop come from."""

    interrupt: Interrupt
    now: Callable[[], float]  # monotonic seconds
    random_unit: Callable[[], float]
    backoff: Backoff = field(default_factory=Backoff)

    def wait_after(self, failures: int) -> None:
        self.interrupt.sleep(self.backoff.delay_s(failures, self.random_unit()))


class ChunkFetcher:
    def __init__(
        self,
        root: Path,
        source: ChunkSource,
        pace: Pace,
        rate: RateLimit,
        share: DownloadShare | None = None,
    ) -> None:
        """`root` is the state directory: chunks go below its cas/. `share` is what `rate` asks for
        what others leave."""
        self._root, self._source, self._pace, self._rate = root, source, pace, rate
        self.share = share or DownloadShare(None, pace.now)

    def cap(self, bytes_per_s: int | None, is_shared: bool = False) -> None:
        """No faster than this, nor than the device's own limit; `is_shared`: nor than what others
        that fetch for the same rollout leave."""
        self._rate.cap(bytes_per_s)
        self.share.assigned(is_shared, bytes_per_s)

    def path(self, digest: str) -> Path:
        return self._root / chunk_key(digest)

    def held(self, chunk: Chunk) -> int:
        """Bytes of the chunk that are on disk, whole or in part."""
        path = self.path(chunk.digest)
        if path.exists():
            return chunk.size
        part = _part(path)
        return min(part.stat().st_size, chunk.size) if part.exists() else 0

    def copy(self, chunk: Chunk, source: Path, offset: int) -> None:
        """From a file of this device; if its bytes are not the chunk's any more, nothing is done
        and `ensure` fetches them. Raises Exhausted when the disk is full, Cancelled."""
        path = self.path(chunk.digest)
        self._pace.interrupt.check()
        if path.exists():
            return
        data = _read_piece(source, offset, chunk.size)
        if digest_bytes(data) != chunk.digest:
            log.warning("chunk.damaged", extra={"chunk": chunk.digest, "path": str(source)})
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk_errors(path), _part(path).open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        with disk_errors(path):
            _part(path).rename(path)
            sync_directory(path.parent)

    def ensure(self, chunk: Chunk, on_bytes: Callable[[int], None]) -> int:
        """Returns how many bytes came over the network; `on_bytes` hears of them as they come.

        Waits out an unreachable controller for as long as it takes. Raises ArtifactInvalid when
        the bytes stay wrong, Exhausted when the disk is full, Cancelled when interrupted."""
        path = self.path(chunk.digest)
        received, failures, bad_answers = 0, 0, 0
        while not path.exists():
            self._pace.interrupt.check()
            before = self.held(chunk)
            try:
                received += self._attempt(chunk, path, on_bytes)
            except Unavailable as e:
                gained = self.held(chunk) - before
                received += max(0, gained)
                failures = 0 if gained > 0 else failures + 1
                log.info("chunk.retry", extra={"chunk": chunk.digest, "cause": str(e)})
                self._pace.wait_after(failures)
            except ArtifactInvalid as e:
                bad_answers += 1
                log.warning("chunk.bad", extra={"chunk": chunk.digest, "cause": str(e)})
                if bad_answers >= _MAX_BAD_ANSWERS:
                    raise
                self._pace.wait_after(bad_answers)
        return received

    def _pieces(self, chunk: Chunk, have: int) -> Iterator[bytes]:
        """From that byte on. Under a cap in portions of a second, each waited for before it is
        asked for: what is on its way cannot be slowed down any more."""
        while have < chunk.size:
            while (wait_s := self.share.wait_s()) > 0:
                self._pace.interrupt.sleep(wait_s)
            count = self._rate.portion(chunk.size - have)
            end = have + count
            self._pace.interrupt.sleep(self._rate.delay_s(count, self._pace.now()))
            for data in _remote(self._source.fetch(chunk.digest, have, count)):
                have += len(data)
                yield data
            if have < end:
                return

    def _attempt(self, chunk: Chunk, path: Path, on_bytes: Callable[[int], None]) -> int:
        part = _part(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk_errors(path), part.open("ab+") as f:
            hasher, have = _hash_so_far(f, chunk.size)
            received = 0
            for data in self._pieces(chunk, have):
                self._pace.interrupt.check()
                if have + received + len(data) > chunk.size:
                    f.truncate(0)
                    raise ArtifactInvalid(f"chunk {short(chunk.digest)} is longer than promised")
                f.write(data)
                hasher.update(data)
                received += len(data)
                on_bytes(len(data))
            f.flush()
            os.fsync(f.fileno())
        _check_whole(chunk, part, have + received, received, hasher.hexdigest())
        with disk_errors(path):
            part.rename(path)
            sync_directory(path.parent)
        return received


def _read_piece(source: Path, offset: int, size: int) -> bytes:
    """Empty when it cannot be read: that, and one that is too short, has another digest."""
    try:
        with source.open("rb") as f:
            f.seek(offset)
            return f.read(size)
    except OSError as e:
        log.warning("chunk.unreadable", extra={"path": str(source), "cause": str(e)})
        return b""


def _remote(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The other side's transient errors, as Unavailable: an Exhausted here is not our disk."""
    try:
        yield from pieces
    except TRANSIENT as e:
        raise Unavailable(str(e)) from e


def _check_whole(chunk: Chunk, part: Path, size: int, received: int, hex_digest: str) -> None:
    if size < chunk.size:
        text = f"chunk {short(chunk.digest)} ended after {size} of {chunk.size} bytes"
        raise Unavailable(text) if received else ArtifactInvalid(text)
    if f"sha256:{hex_digest}" != chunk.digest:
        part.unlink()
        raise ArtifactInvalid(
            f"chunk {short(chunk.digest)} arrived with other bytes than its digest says"
        )


def _hash_so_far(f: BinaryIO, size: int) -> tuple[hashlib._Hash, int]:
    """Hash and length of what an earlier attempt left; a part that is too long starts again."""
    hasher = hashlib.sha256()
    if os.fstat(f.fileno()).st_size > size:
        f.truncate(0)
    f.seek(0)
    have = 0
    while block := f.read(_READ_BYTES):
        hasher.update(block)
        have += len(block)
    return hasher, have


class disk_errors:
    """Turns the disk's errors into ours, naming the path and the next step."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, OSError):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Exhausted(
                f"the disk is full while writing {self._path}; free space: the download resumes "
                "where it stopped"
            ) from error
        raise Refused(f"{self._path} cannot be written: {error.strerror}") from error


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")
