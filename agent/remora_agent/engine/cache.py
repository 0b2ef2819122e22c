"""Built engines on disk, by build key: complete and undamaged, or not there.

    ENGINES/<64 hex>/engine.json   which build, and digest of every other file
    ENGINES/<64 hex>/...           what the backend loads
    ENGINES/<64 hex>.seen          mtime: last use; content: what was last verified
    ENGINES/<64 hex>.kernels       what the backend compiled when it loaded the engine; bounded
    ENGINES/tmp/<64 hex>.<random>/ a build under way, or the rest of an interrupted one
    ENGINES/locks/<64 hex>         held by the process that builds this key
    ENGINES/kept/<64 hex>          what a builder measured, by digest of the recipe; few, bounded

Knows no backend. Files are hashed once after every boot and whenever they changed on disk: power
loss is what damages them, and an engine must start in a second.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from remora_agent.engine.disk import disk_error, disk_errors, lock_file, sync_tree, try_lock
from remora_agent.engine.recipe import BuildKey, Recipe
from remora_contract.bundle import BundleFile, verify_files
from remora_contract.digests import (
    canonical_json,
    digest_bytes,
    digest_document,
    digest_file,
    hex_of,
    short,
)
from remora_contract.errors import ArtifactInvalid, DocumentInvalid, Exhausted, Refused, RemoraError
from remora_contract.strict import loads

log = logging.getLogger(__name__)

MANIFEST = "engine.json"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MAX_MANIFEST_BYTES = 1 << 20
_MAX_KEPT = 16  # files that builders measured
_KERNELS = ".kernels"


@dataclass(frozen=True)
class EngineManifest:
    key: BuildKey
    files: tuple[BundleFile, ...]
    facts: dict[str, str]  # what the backend wants to know when it loads

    @property
    def digest(self) -> str:
        """Identity of the built engine: build key and bytes."""
        return digest_document(self)


@dataclass(frozen=True)
class CacheEntry:
    directory: Path
    manifest: EngineManifest

    @property
    def bytes(self) -> int:
        return sum(f.size for f in self.manifest.files)

    @property
    def kernels(self) -> Path:
        """A file that the backend may write, and that goes with the entry."""
        return _kernels(self.directory)


@dataclass(frozen=True)
class Stored:
    """What eviction looks at: one entry's key digest, size and last use."""

    key: str
    bytes: int
    used_ns: int


def to_evict(stored: Collection[Stored], max_bytes: int, in_use: Collection[str]) -> list[str]:
    """Least recently used keys whose removal brings the cache to `max_bytes`, never one in use."""
    excess = sum(s.bytes for s in stored) - max_bytes
    chosen = []
    for s in sorted(stored, key=lambda s: (s.used_ns, s.key)):
        if excess <= 0:
            break
        if s.key not in in_use:
            chosen.append(s.key)
            excess -= s.bytes
    return chosen


def read_entry(directory: Path) -> CacheEntry:
    """An entry by its folder, its files not verified. Raises ArtifactInvalid, DocumentInvalid."""
    path = directory / MANIFEST
    if not path.is_file() or path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise ArtifactInvalid(f"{path} is missing or too large")
    return CacheEntry(directory, loads(EngineManifest, path.read_bytes(), str(path)))


class EngineCache:
    """One folder of built engines, shared by all processes of a device."""

    def __init__(
        self, root: Path, max_bytes: int, clock_ns: Callable[[], int] = time.time_ns
    ) -> None:
        """Makes the folders and removes what interrupted builds left. Raises Refused (not a place
        to write to), Exhausted."""
        self.root = root
        self.max_bytes = max_bytes
        self._clock_ns = clock_ns
        try:
            for folder in (root, self._tmp, self._locks, self._kept):
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass  # it can be written to
        except OSError as e:
            raise _unusable(root, e) from e
        self._remove_leftovers()

    def find(self, key: str) -> CacheEntry | None:
        """The verified engine of this key digest, or None. A damaged one is removed."""
        directory = self._directory(key)
        if not directory.exists():
            return None
        try:
            entry = self._load(key)
        except (ArtifactInvalid, DocumentInvalid) as e:
            log.warning("engine_cache.damaged", extra={"key": short(key), "reason": str(e)})
            self.remove(key)
            return None
        self._mark_used(key)
        return entry

    @contextmanager
    def building(self, key: str, cancelled: Callable[[], bool]) -> Iterator[Path]:
        """A folder to build in, this process alone working on the key; removed unless committed.

        Waits for another process that builds the same key. Raises Cancelled, Exhausted.
        """
        with lock_file(self._locks / hex_of(key), cancelled):
            with disk_errors(self._tmp):
                staging = Path(tempfile.mkdtemp(prefix=f"{hex_of(key)}.", dir=self._tmp))
            try:
                yield staging
            finally:
                if staging.exists():
                    shutil.rmtree(staging)

    def commit(self, staging: Path, key: BuildKey, facts: dict[str, str]) -> CacheEntry:
        """Makes a finished build visible, on disk before it has its name. Raises Exhausted."""
        files = tuple(
            BundleFile(p.relative_to(staging).as_posix(), p.stat().st_size, digest_file(p))
            for p in sorted(staging.rglob("*"))
            if p.is_file()
        )
        return self.adopt(staging, EngineManifest(key, files, facts))

    def adopt(self, staging: Path, manifest: EngineManifest) -> CacheEntry:
        """Like `commit`, of files that the caller has verified. Raises Exhausted."""
        key = manifest.key.digest
        directory = self._directory(key)
        with disk_errors(staging):
            (staging / MANIFEST).write_bytes(canonical_json(manifest))
            sync_tree(staging)
            if directory.exists():
                self.remove(key)
            staging.rename(directory)
            sync_tree(self.root, recurse=False)
        self._mark_verified(key, manifest.files)
        return CacheEntry(directory, manifest)

    def recent(self, count: int) -> tuple[str, ...]:
        """Key digests of the engines that were used last, the newest last."""
        ordered = sorted(self.stored(), key=lambda s: (s.used_ns, s.key))
        return tuple(s.key for s in ordered[-count:])

    def kept(self, recipe: Recipe) -> Path:
        """Where a build by this recipe may leave, and find, what it measured: a file that outlives
        its engine, shared by all graphs. Version, GPU and driver are in the recipe."""
        return self._kept / hex_of(digest_document(recipe))

    def evict(self, in_use: Collection[str]) -> list[str]:
        """Removes least recently used engines beyond `max_bytes`; returns their key digests.

        `in_use` holds key digests that stay whatever they weigh.
        """
        self._trim_kept()
        chosen = to_evict(self.stored(), self.max_bytes, in_use)
        for key in chosen:
            log.info("engine_cache.evicted", extra={"key": short(key)})
            self.remove(key)
        return chosen

    def stored(self) -> list[Stored]:
        """Everything the cache holds, damaged or not."""
        found = []
        for directory in self.root.iterdir():
            if len(directory.name) == 64 and directory.is_dir():
                size = sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
                if (kernels := _kernels(directory)).exists():
                    size += kernels.stat().st_size
                key = f"sha256:{directory.name}"
                seen = self._seen(key)
                used_ns = seen.stat().st_mtime_ns if seen.exists() else 0
                found.append(Stored(key, size, used_ns))
        return found

    def remove(self, key: str) -> None:
        """Removes an entry; at no moment does a half of it bear its name."""
        with disk_errors(self.root):
            grave = Path(tempfile.mkdtemp(prefix=f"{hex_of(key)}.", dir=self._tmp))
            directory = self._directory(key)
            if directory.exists():
                directory.rename(grave / "entry")
            self._seen(key).unlink(missing_ok=True)
            _kernels(directory).unlink(missing_ok=True)
            # Another process may be clearing the same leftovers.
            shutil.rmtree(grave, ignore_errors=True)

    def _load(self, key: str) -> CacheEntry:
        entry = read_entry(self._directory(key))
        if entry.manifest.key.digest != key:
            raise ArtifactInvalid(f"{entry.directory} holds another build")
        if self._seen_content(key) != self._fingerprint(key, entry.manifest.files):
            verify_files(entry.directory, entry.manifest.files)
            self._mark_verified(key, entry.manifest.files)
        return entry

    def _fingerprint(self, key: str, files: tuple[BundleFile, ...]) -> bytes:
        """Changes with the boot and with any file's size, time or inode."""
        boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
        facts = [boot]
        for name in (MANIFEST, *(f.path for f in files)):
            path = self._directory(key) / name
            if not path.is_file():
                raise ArtifactInvalid(f"{path} is missing")
            s = path.stat()
            facts.append(f"{name} {s.st_size} {s.st_mtime_ns} {s.st_ino}")
        return digest_bytes("\n".join(facts).encode()).encode()

    def _mark_verified(self, key: str, files: tuple[BundleFile, ...]) -> None:
        with disk_errors(self.root):
            self._seen(key).write_bytes(self._fingerprint(key, files))
        self._mark_used(key)

    def _mark_used(self, key: str) -> None:
        now = self._clock_ns()
        with disk_errors(self.root):
            os.utime(self._seen(key), ns=(now, now))

    def _seen_content(self, key: str) -> bytes:
        seen = self._seen(key)
        return seen.read_bytes() if seen.exists() else b""

    def _remove_leftovers(self) -> None:
        """Folders of builds whose builder is gone: its lock would be held otherwise. And what was
        compiled of engines that are gone."""
        for path in self.root.glob(f"*{_KERNELS}*"):
            if not (self.root / path.name.partition(".")[0]).exists():
                path.unlink(missing_ok=True)
        for folder in self._tmp.iterdir():
            with try_lock(self._locks / folder.name.partition(".")[0]) as free:
                if free:
                    log.info("engine_cache.leftover_removed", extra={"folder": folder.name})
                    shutil.rmtree(folder, ignore_errors=True)

    def _trim_kept(self) -> None:
        """Leaves the newest few; also no rest of an interrupted write stays for long."""
        with disk_errors(self._kept):
            files = sorted(self._kept.iterdir(), key=lambda p: p.stat().st_mtime_ns, reverse=True)
            for path in files[_MAX_KEPT:]:
                path.unlink(missing_ok=True)

    def _directory(self, key: str) -> Path:
        return self.root / hex_of(key)

    def _seen(self, key: str) -> Path:
        return self.root / f"{hex_of(key)}.seen"

    @property
    def _tmp(self) -> Path:
        return self.root / "tmp"

    @property
    def _locks(self) -> Path:
        return self.root / "locks"

    @property
    def _kept(self) -> Path:
        return self.root / "kept"


def _kernels(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}{_KERNELS}")


def _unusable(root: Path, error: OSError) -> RemoraError:
    known = disk_error(root, error)
    if isinstance(known, Exhausted):
        return known
    return Refused(
        f"engines cannot be kept in {root}: {error.strerror or error}; choose another directory"
    )
