"""Artifacts onto the disk: resume at the byte, bytes that lie, manifests that lie, full disks."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from remora_agent.control import fetch as fetch_module
from remora_agent.control.fetch import ChunkFetcher, Pace
from remora_agent.control.interrupt import Interrupt
from remora_agent.control.layout import StateLayout
from remora_agent.control.pacing import Backoff, RateLimit
from remora_agent.control.staging import Stager, Wanted
from remora_contract.artifact import Chunk, Manifest, Signature, chunk_key, manifest_key
from remora_contract.bundle import load_bundle, verify_files
from remora_contract.errors import (
    ArtifactInvalid,
    Cancelled,
    DocumentInvalid,
    Exhausted,
    InternalFault,
    NotFound,
    Unavailable,
    Unsupported,
)
from tests.support.repository import Repository

PIECE = 10_000


class Source:
    """A chunk source over a repository folder, with one answer for each fault."""

    def __init__(self, root: Path) -> None:
        self.root, self.sent, self.asked = root, 0, []
        self.cut_at: int | None = None  # total bytes after which every answer breaks, once
        self.spoil = 0
        self.extra = b""
        self.manifest_errors = []
        self.before = lambda chunk_digest, offset: None  # asked before each answer

    def manifest(self, digest: str) -> bytes:
        if self.manifest_errors:
            raise self.manifest_errors.pop()
        path = self.root / manifest_key(digest)
        if not path.exists():
            raise NotFound(f"{digest} is unknown")
        return path.read_bytes()

    def fetch(self, chunk_digest: str, offset: int, length: int) -> Iterator[bytes]:
        self.asked.append((chunk_digest, offset))
        self.before(chunk_digest, offset)
        data = (self.root / chunk_key(chunk_digest)).read_bytes()[offset : offset + length]
        if self.spoil:
            self.spoil -= 1
            data = bytes([data[0] ^ 1]) + data[1:]
        for at in range(0, len(data), PIECE):
            if self.cut_at is not None and self.sent >= self.cut_at:
                self.cut_at = None
                raise Unavailable("connection lost")
            piece = data[at : at + PIECE]
            self.sent += len(piece)
            yield piece
        if self.extra:
            yield self.extra


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path / "repository")


@pytest.fixture
def source(repository):
    return Source(repository.root)


@pytest.fixture
def layout(tmp_path):
    layout = StateLayout(tmp_path / "state")
    layout.create()
    return layout


def make_stager(layout: StateLayout, source: Source, floor: int = 0) -> Stager:
    pace = Pace(Interrupt(), time.monotonic, lambda: 0.0, Backoff())
    fetcher = ChunkFetcher(layout.root, source, pace, RateLimit(None, 0.0))
    return Stager(layout, source, fetcher, pace, floor)


def stage(stager: Stager, *manifests: Manifest):
    wanted = [Wanted(m.kind, m.digest) for m in manifests]
    return stager.stage(wanted, lambda what, fraction: None)


def check_whole(layout: StateLayout, manifest: Manifest) -> None:
    directory = layout.artifact(manifest.digest)
    verify_files(directory, load_bundle(directory).files)


def test_a_bundle_arrives_whole_and_verified(layout, source, repository):
    manifest = repository.bundle()
    [fetched] = stage(make_stager(layout, source), manifest)
    directory = layout.artifact(manifest.digest)
    bundle = load_bundle(directory)
    assert bundle.digest == manifest.digest
    verify_files(directory, bundle.files)
    assert fetched.received_bytes == manifest.bytes


def test_an_adapter_ships_its_own_bytes_only(layout, source, repository):
    bundle, adapter = repository.bundle(), repository.adapter()
    stage(make_stager(layout, source), bundle)
    [fetched] = stage(make_stager(layout, source), bundle, adapter)
    assert (fetched.digest, fetched.received_bytes) == (adapter.digest, adapter.bytes)


def test_staging_leaves_no_chunks_and_no_partial_directory(layout, source, repository):
    stage(make_stager(layout, source), repository.bundle(), repository.adapter())
    assert [p for p in layout.cas.rglob("*") if p.is_file()] == []
    assert not list(layout.artifacts.glob(".*.partial"))


@pytest.mark.parametrize("cut_at", [1, PIECE, 150_000, 440_000])
def test_a_lost_connection_resumes_at_the_byte(layout, source, repository, cut_at):
    manifest = repository.bundle()
    source.cut_at = cut_at
    stage(make_stager(layout, source), manifest)
    assert source.sent == manifest.bytes, "not a byte came twice"
    check_whole(layout, manifest)


def test_an_interrupted_agent_resumes_at_the_byte(layout, source, repository):
    manifest = repository.bundle()
    stopped = Interrupt()
    pace = Pace(stopped, time.monotonic, lambda: 0.0)
    fetcher = ChunkFetcher(layout.root, source, pace, RateLimit(None, 0.0))
    stager = Stager(layout, source, fetcher, pace, 0)

    def stop_half_way(what: str, fraction: float) -> None:
        if fraction > 0.5:
            stopped.set("the agent stops")

    with pytest.raises(Cancelled):
        stager.stage([Wanted("bundle", manifest.digest)], stop_half_way)
    before = source.sent
    assert 0 < before < manifest.bytes
    stage(make_stager(layout, source), manifest)
    # The piece in flight when the agent stopped was received and not written.
    assert source.sent <= manifest.bytes + PIECE


def test_damage_in_a_part_on_disk_is_found_and_fetched_again(layout, source, repository):
    manifest = repository.bundle()
    chunk = manifest.files[-1].chunks[0]
    part = layout.root / (chunk_key(chunk.digest) + ".part")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"\0" * 50_000)
    stage(make_stager(layout, source), manifest)
    check_whole(layout, manifest)


def test_a_part_longer_than_its_chunk_starts_again(layout, source, repository):
    manifest = repository.adapter()
    chunk = manifest.files[-1].chunks[0]
    part = layout.root / (chunk_key(chunk.digest) + ".part")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"\0" * (chunk.size + 5))
    stage(make_stager(layout, source), manifest)
    assert layout.artifact(manifest.digest).is_dir()


def test_a_corrupt_chunk_is_fetched_again(layout, source, repository):
    source.spoil = 2
    manifest = repository.bundle()
    stage(make_stager(layout, source), manifest)
    check_whole(layout, manifest)


def test_a_chunk_that_stays_corrupt_is_refused_by_name(layout, source, repository):
    source.spoil = 99
    manifest = repository.bundle()
    with pytest.raises(ArtifactInvalid, match="other bytes than its digest says"):
        stage(make_stager(layout, source), manifest)
    assert not layout.artifact(manifest.digest).exists()


def test_more_bytes_than_promised_never_reach_the_disk(layout, source, repository):
    source.extra = b"x" * 1000
    manifest = repository.bundle()
    with pytest.raises(ArtifactInvalid, match="longer than promised"):
        stage(make_stager(layout, source), manifest)
    assert sum(p.stat().st_size for p in layout.cas.rglob("*") if p.is_file()) == 0


def test_a_truncated_chunk_on_the_server_ends_in_an_error_not_a_loop(layout, source, repository):
    manifest = repository.adapter()
    path = repository.root / chunk_key(manifest.files[-1].chunks[0].digest)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ArtifactInvalid, match="ended after 1000 of 30000 bytes"):
        stage(make_stager(layout, source), manifest)


def test_a_manifest_that_lies_about_sizes_is_refused_before_a_byte_is_taken(
    layout, source, repository
):
    manifest = repository.bundle()
    huge = 16 << 20
    chunks = tuple(Chunk(f"sha256:{i:064x}", huge) for i in range(20_000))
    lied = replace(manifest.files[-1], size=huge * len(chunks), chunks=chunks)
    repository.tamper(manifest, files=(*manifest.files[:-1], lied))
    with pytest.raises(Exhausted, match=r"needs \d{12,} bytes .* only \d+ are free"):
        stage(make_stager(layout, source), manifest)
    assert source.asked == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {"signatures": (Signature("k", "v"),)}, "signatures"),
        (lambda m: {"digest": "sha256:" + "1" * 64}, "is the manifest of"),
        (lambda m: {"files": m.files[1:]}, "has no bundle.json"),
        (lambda m: {"files": (*m.files, m.files[1])}, "twice"),
        (lambda m: {"files": (*m.files, replace(m.files[1], path="evil.so"))}, "evil.so"),
        (lambda m: {"files": m.files[:-1]}, "model.onnx.data"),
        (lambda m: {"kind": "adapter"}, "has no adapter.json"),
    ],
)
def test_manifests_that_lie_are_refused_by_name(layout, source, repository, change, message):
    manifest = repository.bundle()
    repository.tamper(manifest, **change(manifest))
    with pytest.raises((ArtifactInvalid, Unsupported), match=message):
        stage(make_stager(layout, source), manifest)
    assert not layout.artifact(manifest.digest).exists()


def test_a_path_that_climbs_out_is_refused(layout, source, repository):
    manifest = repository.bundle()
    path = repository.root / manifest_key(manifest.digest)
    path.write_bytes(path.read_bytes().replace(b'"model.onnx"', b'"../../x"'))
    with pytest.raises(DocumentInvalid, match="unsafe path"):
        stage(make_stager(layout, source), manifest)


def test_swapped_files_are_refused_by_the_document(layout, source, repository):
    """Chunks and manifest agree with each other, but not with what was assigned."""
    good, evil = repository.bundle(1), repository.bundle(2)
    repository.tamper(good, files=(good.files[0], *evil.files[1:]))
    with pytest.raises(ArtifactInvalid, match="disagree"):
        stage(make_stager(layout, source), good)


def test_another_artifacts_document_is_refused(layout, source, repository):
    good, evil = repository.bundle(1), repository.bundle(2)
    repository.tamper(good, files=evil.files)
    with pytest.raises(ArtifactInvalid, match="assigned was"):
        stage(make_stager(layout, source), good)


def test_a_bundle_assigned_as_adapter_is_refused(layout, source, repository):
    manifest = repository.bundle()
    with pytest.raises(ArtifactInvalid, match="is a bundle, the release needs a adapter"):
        make_stager(layout, source).stage(
            [Wanted("adapter", manifest.digest)], lambda what, fraction: None
        )


def test_an_unknown_artifact_is_not_found_and_not_retried(layout, source):
    with pytest.raises(NotFound):
        make_stager(layout, source).stage(
            [Wanted("bundle", "sha256:" + "5" * 64)], lambda what, fraction: None
        )


def test_an_unreachable_or_faulty_controller_is_waited_for(layout, source, repository):
    manifest = repository.adapter()
    source.manifest_errors = [Unavailable("starting"), InternalFault("oops"), Exhausted("busy")]
    stage(make_stager(layout, source), manifest)
    assert layout.artifact(manifest.digest).is_dir()


def test_the_disk_floor_is_kept(layout, source, repository):
    manifest = repository.bundle()
    free = os.statvfs(layout.root).f_bavail * os.statvfs(layout.root).f_frsize
    with pytest.raises(Exhausted, match="disk_floor_bytes"):
        stage(make_stager(layout, source, floor=free), manifest)
    assert source.asked == []


def test_what_is_held_already_is_not_needed_again(layout, source, repository, monkeypatch):
    """A nearly full disk does not refuse to finish what it has almost completed."""
    manifest = repository.bundle()
    source.cut_at = 400_000
    interrupt = Interrupt()
    pace = Pace(interrupt, time.monotonic, lambda: 1.0, Backoff(base_s=100))
    fetcher = ChunkFetcher(layout.root, source, pace, RateLimit(None, 0.0))
    stager = Stager(layout, source, fetcher, pace, 0)
    monkeypatch.setattr(Pace, "wait_after", lambda self, n: (_ for _ in ()).throw(Cancelled("x")))
    with pytest.raises(Cancelled):
        stager.stage([Wanted("bundle", manifest.digest)], lambda w, f: None)
    monkeypatch.undo()
    room = manifest.files[-1].size + 100_000  # for joining the file, and the rest of the download
    monkeypatch.setattr("remora_agent.control.staging.disk_free", lambda path: room)
    stage(make_stager(layout, source), manifest)


def test_a_disk_that_fills_during_the_download_is_named_and_resumes(
    layout, source, repository, monkeypatch
):
    manifest = repository.bundle()
    real = fetch_module.os.fsync
    monkeypatch.setattr(
        fetch_module.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
    )
    with pytest.raises(Exhausted, match=r"disk is full while writing .*cas"):
        stage(make_stager(layout, source), manifest)
    monkeypatch.setattr(fetch_module.os, "fsync", real)
    stage(make_stager(layout, source), manifest)
    assert source.sent == manifest.bytes


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full(tmp_path, source, repository):
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(mount)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        layout = StateLayout(mount)
        layout.create()
        manifest = repository.bundle()
        with pytest.raises(Exhausted, match="only"):
            stage(make_stager(layout, source), manifest)
        stager = make_stager(layout, source)
        stager._check_disk = lambda jobs: None  # somebody else fills the disk meanwhile
        with pytest.raises(Exhausted, match="the disk is full while writing"):
            stage(stager, manifest)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_the_bandwidth_cap_holds(layout, repository, source):
    """The manual clock advances only when the fetcher waits, so it reads the time it took."""
    manifest = repository.bundle(size=400_000)
    clock = [0.0]

    class Waiting(Interrupt):
        def sleep(self, seconds: float) -> None:
            clock[0] += seconds

    pace = Pace(Waiting(), lambda: clock[0], lambda: 0.0)
    fetcher = ChunkFetcher(layout.root, source, pace, RateLimit(100_000, 0.0))
    Stager(layout, source, fetcher, pace, 0).stage(
        [Wanted("bundle", manifest.digest)], lambda w, f: None
    )
    # One second's worth may come as a burst.
    assert manifest.bytes / 100_000 - 1.1 <= clock[0] <= manifest.bytes / 100_000 + 1e-6


def test_backoff_is_full_jitter_and_capped():
    backoff = Backoff(base_s=1.0, cap_s=8.0)
    assert [backoff.delay_s(n, 1.0) for n in range(6)] == [1, 2, 4, 8, 8, 8]
    assert backoff.delay_s(1000, 0.25) == 2.0
    assert backoff.delay_s(3, 0.0) == 0.0


def test_progress_grows_to_one(layout, source, repository):
    seen = []
    manifest = repository.bundle()
    source.cut_at = random.Random(1).randrange(manifest.bytes)
    make_stager(layout, source).stage(
        [Wanted("bundle", manifest.digest)], lambda what, fraction: seen.append(fraction)
    )
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
