"""The controller's folder of engines that devices uploaded: bounded, verified, then named.

DIR/offers/<64 hex>.json       what a device is uploading, by its ticket; removed when it is whole
DIR/cas/sha256/ab/<64 hex>     chunks, of offers and of whole engines
DIR/manifests/<64 hex>.json    whole engines, by digest: only they are served

Killed anywhere, what is whole stays whole and an upload goes on where it was. Decides nothing about
who may upload. Thread-safe; blocks.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from remora_contract.artifact import Manifest, chunk_key, manifest_key
from remora_contract.bundle import read_document
from remora_contract.digests import canonical_json, digest_bytes, digest_document, hex_of, short
from remora_contract.engine import ENGINE_JSON, EngineDocument
from remora_contract.errors import ArtifactInvalid, Exhausted, InvalidInput, NotFound, RemoraError
from remora_contract.strict import loads

log = logging.getLogger(__name__)
MAX_MANIFEST_BYTES = 4 << 20
MAX_DOCUMENT_BYTES = 1 << 20  # engine.json
MAX_FILES = 64
MAX_CHUNK_BYTES = 2 << 20
DISK_FLOOR_BYTES = 256 << 20
_RETRY_AFTER_S = 300.0


@dataclass(frozen=True)
class Whole:
    """An engine that is served."""

    manifest: Manifest
    document: EngineDocument


class Depot:
    def __init__(self, root: Path, max_bytes: int) -> None:
        self.root, self.max_bytes = root, max_bytes
        self._lock = threading.RLock()
        for folder in (self._offers, root / "manifests", root / "cas"):
            folder.mkdir(parents=True, exist_ok=True)
        self._whole: dict[str, Manifest] = {}
        self._chunks: dict[str, int] = {}
        self._unconfirmed: set[str] = set()  # whole, and nobody's yet: not to be collected
        self._scan()

    @property
    def stored_bytes(self) -> int:
        with self._lock:
            return sum(m.bytes for m in self._whole.values())

    def has(self, digest: str) -> bool:
        with self._lock:
            return digest in self._whole

    def manifest_json(self, digest: str) -> bytes:
        """Raises NotFound."""
        if not self.has(digest):
            raise NotFound(f"engine {short(digest)} is not shared any more")
        return read_document(self.root / manifest_key(digest))

    def has_chunk(self, digest: str) -> bool:
        with self._lock:
            return digest in self._chunks

    def chunk(self, digest: str) -> tuple[Path, int]:
        """Path and size of a whole engine's chunk. Raises NotFound, ArtifactInvalid."""
        with self._lock:
            size = self._chunks.get(digest)
        if size is None:
            raise NotFound(f"no shared engine has a chunk {short(digest)}")
        path = self.root / chunk_key(digest)
        if not path.is_file() or path.stat().st_size != size:
            raise ArtifactInvalid(f"chunk {short(digest)} of a shared engine is damaged")
        return path, size

    def offer(self, name: str, manifest: Manifest) -> list[str]:
        """Begins or resumes an upload under a name (64 hex); the chunks that are missing. Raises
        Exhausted where cap or disk have no room."""
        with self._lock:
            others = sum(
                self._offered(p).bytes for p in self._offers.glob("*.json") if p.stem != name
            )
            if self.stored_bytes + others + manifest.bytes > self.max_bytes:
                raise Exhausted(
                    f"shared engines may take {self.max_bytes >> 20} MiB and this one of "
                    f"{manifest.bytes >> 20} MiB does not fit beside the others; raise "
                    "shared_engines_bytes in controller.toml",
                    _RETRY_AFTER_S,
                )
            missing = [c for c, size in manifest.chunks().items() if not self._holds(c, size)]
            sizes = manifest.chunks()
            self._check_disk(sum(sizes[c] for c in missing))
            self._write(self._offers / f"{name}.json", canonical_json(manifest))
            return missing

    def put(self, name: str, digest: str, data: bytes) -> None:
        """Raises NotFound (nothing offered has it), ArtifactInvalid, Exhausted."""
        size = self.offered(name).chunks().get(digest)
        if size is None:
            raise NotFound(f"the engine that was offered has no chunk {short(digest)}")
        if len(data) != size or digest_bytes(data) != digest:
            raise ArtifactInvalid(f"chunk {short(digest)} arrived with other bytes than promised")
        self._check_disk(size)
        if not self._holds(digest, size):
            self._write(self.root / chunk_key(digest), data)

    def finish(self, name: str, key_digest: str) -> Whole:
        """Makes a whole upload visible, not to be collected before `confirm`. Raises NotFound,
        ArtifactInvalid for what is missing or does not agree; the offer stays then."""
        manifest = self.offered(name)
        missing = [c for c, size in manifest.chunks().items() if not self._holds(c, size)]
        if missing:
            raise ArtifactInvalid(
                f"{len(missing)} chunks of the engine are missing; offer it again"
            )
        document = self._document(manifest)
        check_offer(manifest, document, key_digest)
        self._check_files(manifest)
        with self._lock:
            self._unconfirmed.add(manifest.digest)
            self._write(self.root / manifest_key(manifest.digest), canonical_json(manifest))
            (self._offers / f"{name}.json").unlink(missing_ok=True)
            self._add(manifest)
        return Whole(manifest, document)

    def confirm(self, digest: str) -> None:
        """A ticket names it now, or nobody will."""
        with self._lock:
            self._unconfirmed.discard(digest)

    def offered(self, name: str) -> Manifest:
        """Raises NotFound."""
        with self._lock:
            path = self._offers / f"{name}.json"
            if not path.exists():
                raise NotFound("no engine is being uploaded for this key; offer it first")
            return self._offered(path)

    def collect(self, engines: Collection[str], offers: Collection[str]) -> list[str]:
        """Removes every engine and offer that is not named, and chunks that none needs. Digests of
        the engines that went."""
        with self._lock:
            for path in self._offers.iterdir():
                if path.stem not in offers:
                    path.unlink()
            gone = [d for d in self._whole if d not in engines and d not in self._unconfirmed]
            for digest in gone:
                (self.root / manifest_key(digest)).unlink(missing_ok=True)
                del self._whole[digest]
            self._sweep()
        return gone

    def _sweep(self, is_start: bool = False) -> None:
        """Temporary files are somebody's that is being written, but for those of a former run."""
        self._chunks = {c: s for m in self._whole.values() for c, s in m.chunks().items()}
        offered = [self._offered(p).chunks() for p in self._offers.glob("*.json")]
        needed = {hex_of(c) for chunks in (self._chunks, *offered) for c in chunks}
        for path in (self.root / "cas").rglob("*"):
            is_mine = is_start or not path.name.startswith(".")
            if path.is_file() and is_mine and path.name not in needed:
                path.unlink()

    def _scan(self) -> None:
        for path in (self.root / "manifests").glob("*.json"):
            if found := self._readable(path):
                self._add(found)
        for path in self._offers.iterdir():
            self._readable(path)
        self._sweep(is_start=True)

    def _readable(self, path: Path) -> Manifest | None:
        """A manifest; removed and told where it is damaged."""
        try:
            return self._offered(path)
        except InvalidInput as e:
            log.warning("shared_engine.damaged", extra={"path": str(path), "cause": str(e)})
            path.unlink()
            return None

    def _add(self, manifest: Manifest) -> None:
        self._whole[manifest.digest] = manifest
        self._chunks.update(manifest.chunks())

    def _document(self, manifest: Manifest) -> EngineDocument:
        (file,) = [f for f in manifest.files if f.path == ENGINE_JSON]
        data = b"".join((self.root / chunk_key(c.digest)).read_bytes() for c in file.chunks)
        return loads(EngineDocument, data, ENGINE_JSON)

    def _check_files(self, manifest: Manifest) -> None:
        """Every chunk is what it should be; so must be what they make."""
        for file in manifest.files:
            hasher = hashlib.sha256()
            for chunk in file.chunks:
                hasher.update((self.root / chunk_key(chunk.digest)).read_bytes())
            if f"sha256:{hasher.hexdigest()}" != file.digest:
                raise ArtifactInvalid(f"the chunks of {file.path} do not make that file")

    def _offered(self, path: Path) -> Manifest:
        return loads(Manifest, read_document(path), str(path))

    def _holds(self, digest: str, size: int) -> bool:
        path = self.root / chunk_key(digest)
        return path.is_file() and path.stat().st_size == size

    def _check_disk(self, need: int) -> None:
        free = shutil.disk_usage(self.root).free
        if need + DISK_FLOOR_BYTES > free:
            raise Exhausted(
                f"the controller's disk has {free >> 20} MiB free and "
                f"{DISK_FLOOR_BYTES >> 20} MiB must stay: no engine is taken in",
                _RETRY_AFTER_S,
            )

    def _write(self, path: Path, data: bytes) -> None:
        """Whole and on disk, or not there."""
        with _disk_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
            try:
                with os.fdopen(descriptor, "wb") as f:
                    f.write(data)
                    f.flush()
                    os.fsync(f.fileno())
                Path(temporary).rename(path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise

    @property
    def _offers(self) -> Path:
        return self.root / "offers"


def offer_name(key_digest: str, scope: str) -> str:
    return hex_of(digest_document([key_digest, scope]))


def parse_offer(data: bytes) -> Manifest:
    """A device's manifest within bounds. Raises InvalidInput."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise ArtifactInvalid(f"an engine's manifest has at most {MAX_MANIFEST_BYTES} bytes")
    manifest = loads(Manifest, data, "the offered manifest")
    documents = [f for f in manifest.files if f.path == ENGINE_JSON]
    if manifest.kind != "engine" or len(documents) != 1 or len(manifest.files) > MAX_FILES:
        raise ArtifactInvalid(f"an engine is {ENGINE_JSON} and at most {MAX_FILES - 1} files")
    if documents[0].size > MAX_DOCUMENT_BYTES:
        raise ArtifactInvalid(f"{ENGINE_JSON} has more than {MAX_DOCUMENT_BYTES} bytes")
    if manifest.signatures or any(s > MAX_CHUNK_BYTES for s in manifest.chunks().values()):
        raise ArtifactInvalid(f"no signatures, and chunks of at most {MAX_CHUNK_BYTES} bytes")
    return manifest


def check_offer(manifest: Manifest, document: EngineDocument, key_digest: str) -> None:
    """The manifest ships what the document lists, and that has the lease's key. Raises
    ArtifactInvalid."""
    listed = {f.path: (f.size, f.digest) for f in document.files}
    shipped = {f.path: (f.size, f.digest) for f in manifest.files if f.path != ENGINE_JSON}
    if document.key.digest != key_digest:
        raise ArtifactInvalid("the engine has another build key than the lease is for")
    if document.digest != manifest.digest or listed != shipped:
        raise ArtifactInvalid(f"the manifest and {ENGINE_JSON} disagree")
    if document.base_digest != manifest.base_digest:
        raise ArtifactInvalid("the manifest names another graph than the engine was built from")


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as e:
        known: RemoraError = Exhausted("the controller's disk is full", _RETRY_AFTER_S)
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            known = ArtifactInvalid(f"a shared engine could not be stored: {e.strerror}")
        raise known from e
