"""Artifacts made whole on this device: manifest -> chunks -> verified directory, by atomic rename.

A directory artifacts/<hex> exists only when every file in it was verified against the document
whose digest was assigned. File by file, so that the disk holds at most one file twice. Decides
nothing about releases.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from remora_agent.control.facts import disk_free
from remora_agent.control.fetch import TRANSIENT, ChunkFetcher, ChunkSource, Pace, disk_errors
from remora_agent.control.held_chunks import Place, find_chunks, remember, remembered
from remora_agent.control.layout import StateLayout, sync_directory
from remora_agent.control.manifest import (
    DiskNeed,
    check_disk,
    check_document,
    disk_need,
    parse_manifest,
)
from remora_agent.host import Progress
from remora_contract.adapter import Adapter, load_adapter
from remora_contract.artifact import ArtifactFile, Chunk, Kind, Manifest
from remora_contract.bundle import Bundle, load_bundle
from remora_contract.digests import digest_file, short
from remora_contract.engine import EngineDocument, load_engine_document
from remora_contract.errors import ArtifactInvalid

log = logging.getLogger(__name__)
_COPY_BYTES = 1 << 20
_LOADERS: Mapping[Kind, Callable[[Path], Bundle | Adapter | EngineDocument]] = {
    "bundle": load_bundle,
    "adapter": load_adapter,
    "engine": load_engine_document,
}


@dataclass(frozen=True)
class Wanted:
    kind: Kind
    digest: str


@dataclass(frozen=True)
class Fetched:
    """One artifact that was not here before."""

    digest: str
    kind: Kind
    received_bytes: int
    seconds: float


@dataclass(frozen=True)
class _Job:
    manifest: Manifest
    partial: Path
    missing: tuple[ArtifactFile, ...]


class Stager:
    def __init__(
        self,
        layout: StateLayout,
        source: ChunkSource,
        fetcher: ChunkFetcher,
        pace: Pace,
        disk_floor: int,
    ) -> None:
        self._layout, self._source, self._fetcher = layout, source, fetcher
        self._pace, self._floor = pace, disk_floor
        # Frees what nothing needs any more; asked only where the disk is short, because what lies
        # there may hold chunks of what comes.
        self.make_room: Callable[[], int] = lambda: 0

    def cap(self, bytes_per_s: int | None, is_shared: bool = False) -> None:
        """Downloads no faster than this, nor than the device's own limit, nor, when `is_shared`,
        than the rollout's total leaves."""
        self._fetcher.cap(bytes_per_s, is_shared)

    def stage(self, wanted: Sequence[Wanted], progress: Progress) -> list[Fetched]:
        """Makes every artifact's directory exist; only what no artifact here holds already comes
        over the network. Raises Exhausted (disk) before the first byte,
        ArtifactInvalid, DocumentInvalid, Unsupported, NotFound, Cancelled."""
        absent = [w for w in wanted if not self._layout.artifact(w.digest).is_dir()]
        jobs = [self._plan(w) for w in absent]
        self._check_disk(jobs)
        uses = Counter(c.digest for j in jobs for f in j.missing for c in f.chunks)
        tally = _Tally(sum(f.size for j in jobs for f in j.missing), progress)
        here = find_chunks(self._layout, uses.keys())
        with self._fetcher.share.fetching():
            return [self._fetch(job, uses, here, tally) for job in jobs]

    def manifest(self, digest: str) -> Manifest:
        """That of an artifact here, else the controller's: waits out an unreachable one. Raises
        what `stage` does."""
        return remembered(self._layout, digest) or parse_manifest(self._manifest(digest), digest)

    def _plan(self, wanted: Wanted) -> _Job:
        manifest = self.manifest(wanted.digest)
        if manifest.kind != wanted.kind:
            raise ArtifactInvalid(
                f"{short(wanted.digest)} is a {manifest.kind}, the release needs a {wanted.kind}"
            )
        target = self._layout.artifact(wanted.digest)
        partial = target.with_name(f".{target.name}.partial")
        missing = tuple(f for f in manifest.files if not _is_whole(partial / f.path, f))
        return _Job(manifest, partial, missing)

    def _manifest(self, digest: str) -> bytes:
        failures = 0
        while True:
            self._pace.interrupt.check()
            try:
                return self._source.manifest(digest)
            except TRANSIENT as e:
                log.info("manifest.retry", extra={"digest": digest, "cause": str(e)})
                self._pace.wait_after(failures)
                failures += 1

    def _check_disk(self, jobs: Sequence[_Job]) -> None:
        if not jobs:
            return
        needs = []
        for job in jobs:
            chunks = {c.digest: c for f in job.missing for c in f.chunks}
            held = sum(self._fetcher.held(c) for c in chunks.values())
            needs.append(disk_need(job.missing, held))
        need = DiskNeed(sum(n.download for n in needs), max(n.assembly for n in needs))
        free = disk_free(self._layout.artifacts)
        if need.total + self._floor > free and self.make_room():
            free = disk_free(self._layout.artifacts)
        check_disk(need, free, self._floor, f"staging {len(jobs)} artifacts")

    def _fetch(
        self, job: _Job, uses: Counter[str], here: Mapping[str, Place], tally: _Tally
    ) -> Fetched:
        started_s, received = self._pace.now(), 0
        for file in job.missing:
            for chunk in file.chunks:
                received += self._ensure(chunk, here.get(chunk.digest), tally)
            with disk_errors(job.partial / file.path):
                self._assemble(job.partial, file)
            self._release(file, uses)
        self._finish(job)
        seconds = self._pace.now() - started_s
        fetched = Fetched(job.manifest.digest, job.manifest.kind, received, seconds)
        log.info(
            "artifact.fetched",
            extra={"digest": fetched.digest, "bytes": received, "seconds": seconds},
        )
        return fetched

    def _ensure(self, chunk: Chunk, place: Place | None, tally: _Tally) -> int:
        if place is not None:
            self._fetcher.copy(chunk, place.path, place.offset)
        tally.add(self._fetcher.held(chunk))
        return self._fetcher.ensure(chunk, tally.add)

    def _assemble(self, partial: Path, file: ArtifactFile) -> None:
        target = partial / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        sources = [self._fetcher.path(c.digest) for c in file.chunks]
        if len(sources) == 1:
            _link_chunk(sources[0], target, file)
        else:
            _join_chunks(sources, target, file)

    def _release(self, file: ArtifactFile, uses: Counter[str]) -> None:
        """Chunks that no later file needs leave cas/."""
        for chunk in file.chunks:
            uses[chunk.digest] -= 1
            if uses[chunk.digest] == 0:
                self._fetcher.path(chunk.digest).unlink(missing_ok=True)

    def _finish(self, job: _Job) -> None:
        """The document vouches for every file; then the directory gets its name."""
        document = _LOADERS[job.manifest.kind](job.partial)
        check_document(job.manifest, document.digest, document.files)
        listed = {f.path for f in job.manifest.files}
        for path in job.partial.rglob("*"):
            if path.is_file() and path.relative_to(job.partial).as_posix() not in listed:
                path.unlink()
        target = self._layout.artifact(job.manifest.digest)
        with disk_errors(target):
            remember(self._layout, job.manifest)
            sync_directory(job.partial)
            shutil.rmtree(target, ignore_errors=True)
            job.partial.rename(target)
            sync_directory(target.parent)


class _Tally:
    """Bytes done, as the fraction that `progress` wants."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._total, self._progress, self._done = total, progress, 0

    def add(self, count: int) -> None:
        self._done += count
        self._progress("fetching", min(1.0, self._done / max(1, self._total)))


def _is_whole(path: Path, file: ArtifactFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size and digest_file(path) == file.digest


def _link_chunk(source: Path, target: Path, file: ArtifactFile) -> None:
    if f"sha256:{source.name}" != file.digest:
        raise ArtifactInvalid(f"{file.path}: its only chunk has another digest than the file")
    os.link(source, target)


def _join_chunks(sources: Sequence[Path], target: Path, file: ArtifactFile) -> None:
    hasher = hashlib.sha256()
    with target.open("xb") as out:
        for source in sources:
            with source.open("rb") as f:
                while block := f.read(_COPY_BYTES):
                    hasher.update(block)
                    out.write(block)
        out.flush()
        os.fsync(out.fileno())
    if f"sha256:{hasher.hexdigest()}" != file.digest:
        target.unlink()
        raise ArtifactInvalid(f"{file.path}: its chunks do not make the file the manifest names")
