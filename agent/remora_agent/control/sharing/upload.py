"""What the lease's holder does beside its own release: renews the lease while it builds, and
uploads what has answered the golden prompts. One thread; killed anywhere it goes on where it was.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from remora_agent.control.activation import Record
from remora_agent.control.fetch import TRANSIENT, Pace
from remora_agent.control.layout import StateLayout
from remora_agent.control.pacing import RateLimit
from remora_agent.control.sharing.calls import SharingCalls, ToBuild
from remora_agent.control.sharing.pending import (
    GiveUp,
    Pending,
    PendingStore,
    Renew,
    next_step,
)
from remora_agent.host import ServingHost
from remora_contract.artifact import FORMAT_VERSION, ArtifactFile, Chunk, Manifest
from remora_contract.digests import (
    canonical_json,
    digest_bytes,
    digest_document,
    hex_of,
    short,
)
from remora_contract.engine import ENGINE_JSON, load_engine_document, manifest_facts
from remora_contract.errors import (
    ArtifactInvalid,
    DocumentInvalid,
    Exhausted,
    RemoraError,
)

log = logging.getLogger(__name__)
CHUNK_BYTES = 2 << 20
_IDLE_S = 3600.0
_MAX_WHY = 256
_SOON_S = 30.0  # what the controller may ask for before a refusal is an end


@dataclass
class Sharer:
    """`record` says what the device is at; `calls` gives the connection in use."""

    calls: Callable[[], SharingCalls]
    host: ServingHost
    layout: StateLayout
    pending: PendingStore
    record: Callable[[], Record | None]
    pace: Pace
    rate: RateLimit
    emit: Callable[[str, dict[str, object]], None]
    _wake: threading.Event = field(default_factory=threading.Event, init=False)
    _stopping: bool = field(default=False, init=False)
    _failures: int = field(default=0, init=False)

    def poke(self) -> None:
        """Something changed; from any thread."""
        self._wake.set()

    def stop(self) -> None:
        self._stopping = True
        self.pace.interrupt.set("the agent stops")
        self._wake.set()

    def run(self) -> None:
        """Until `stop`."""
        while not self._stopping:
            self._wake.clear()
            self._wake.wait(self.once())

    def once(self) -> float:
        """One step. Returns seconds until the next, unless somebody pokes."""
        try:
            pending = self.pending.get()
            if pending is None:
                return _IDLE_S
            return self._step(pending)
        except DocumentInvalid as e:
            log.warning("engine.not_shared", extra={"reason": str(e)})
            return _IDLE_S
        except RemoraError as e:
            if self._stopping:
                return 0.0
            delay_s = self.pace.backoff.delay_s(self._failures, self.pace.random_unit())
            self._failures += 1
            log.info("engine.share_retry", extra={"cause": str(e), "retry_in_s": delay_s})
            return delay_s

    def _step(self, pending: Pending) -> float:
        """Raises what may pass by itself."""
        step = next_step(pending, self.record())
        try:
            if isinstance(step, Renew):
                return self._renew(pending)
            if isinstance(step, GiveUp):
                self.calls().give_up(pending.key_digest, step.blames_model, step.why)
                self._end(pending, step.why)
            else:
                self._upload(pending if pending.proven else self.pending.prove(pending))
        except RemoraError as e:
            if _may_pass(e):
                raise
            self._abandon(pending, str(e))
        self._failures = 0
        return 0.0

    def _abandon(self, pending: Pending, why: str) -> None:
        """Counted against the engine: the next builder's upload would meet the same."""
        try:
            self.calls().give_up(pending.key_digest, True, f"not uploaded: {why}")
        except RemoraError as e:  # then others wait for the lease to pass
            log.info("engine.give_up_unheard", extra={"cause": str(e)})
        self.emit("engine.not_uploaded", {"reason": why[:_MAX_WHY]})
        self._end(pending, why)

    def _renew(self, pending: Pending) -> float:
        answer = self.calls().claim(pending.key_json.encode())
        self._failures = 0
        if not isinstance(answer, ToBuild):
            self._end(pending, "another device took over, or nothing is shared any more")
        return pending.lease_s / 3

    def _end(self, pending: Pending, why: str) -> None:
        self.pending.end(pending)
        log.info("engine.not_shared", extra={"key": short(pending.key_digest), "reason": why})

    def _upload(self, pending: Pending) -> None:
        started_s, key = self.pace.now(), pending.key_digest
        bundle = self.layout.artifact(pending.bundle_digest)
        directory = self.host.built_engine(bundle)
        if directory is None:
            raise ArtifactInvalid("the engine left the device's cache before it was uploaded")
        if digest_document(load_engine_document(directory).key) != key:
            raise ArtifactInvalid("it was built from another graph of the bundle than was leased")
        manifest = manifest_of(directory, key)
        missing = set(self.calls().offer(key, canonical_json(manifest)))
        sent = 0
        for digest, data in _chunks(directory, manifest, missing):
            self.pace.interrupt.check()
            self.calls().put(key, digest, data)
            sent += len(data)
            self.pace.interrupt.sleep(self.rate.delay_s(len(data), self.pace.now()))
        self.calls().finish(key)
        self.pending.end(pending)
        detail: dict[str, object] = {
            "engine": manifest.digest,
            "bytes": manifest.bytes,
            "sent_bytes": sent,
            "seconds": round(self.pace.now() - started_s, 3),
        }
        self.emit("engine.uploaded", detail)
        log.info("engine.uploaded", extra=detail)


def manifest_of(directory: Path, key_digest: str) -> Manifest:
    """Of an engine in the cache. Raises ArtifactInvalid, DocumentInvalid."""
    document = load_engine_document(directory)
    names = (ENGINE_JSON, *(f.path for f in document.files))
    return Manifest(
        format_version=FORMAT_VERSION,
        kind="engine",
        digest=document.digest,
        name="shared",
        revision=hex_of(key_digest)[:12],
        base_digest=document.base_digest,
        files=tuple(_file(directory, name) for name in names),
        published_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        facts=manifest_facts(document),
    )


def _file(directory: Path, name: str) -> ArtifactFile:
    hasher, chunks = hashlib.sha256(), []
    for data in _pieces(directory / name):
        hasher.update(data)
        chunks.append(Chunk(digest_bytes(data), len(data)))
    size = sum(c.size for c in chunks)
    return ArtifactFile(name, size, f"sha256:{hasher.hexdigest()}", tuple(chunks))


def _chunks(directory: Path, manifest: Manifest, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    """Each wanted chunk once."""
    left = set(wanted)
    for file in manifest.files:
        for chunk, data in zip(file.chunks, _pieces(directory / file.path), strict=False):
            if chunk.digest in left:
                left.discard(chunk.digest)
                yield chunk.digest, data


def _pieces(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as f:
            while data := f.read(CHUNK_BYTES):
                yield data
    except OSError as e:
        raise ArtifactInvalid(f"{path} cannot be read: {e.strerror or e}") from e


def _may_pass(error: RemoraError) -> bool:
    """A full disk or a reached limit at the controller is an end: others should not wait for it."""
    if isinstance(error, Exhausted):
        return error.retry_after_s is not None and error.retry_after_s <= _SOON_S
    return isinstance(error, TRANSIENT)
