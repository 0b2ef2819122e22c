"""Reading adapters from disk beside the step thread, and remembering which files are broken.

Knows files and errors; what is loaded when, and where it goes, is the bank's.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from remora_agent.bank.heap import give_back
from remora_agent.bank.weights import AdapterWeights
from remora_contract.adapter import ADAPTER_JSON, WEIGHTS_FILE
from remora_contract.digests import short
from remora_contract.errors import ArtifactInvalid, Exhausted, InternalFault, RemoraError, anew

log = logging.getLogger(__name__)

MAX_IN_FLIGHT = 2
MAX_REMEMBERED = 256

# A broken file that has not changed is read again after so many seconds at the earliest.
RETRY_S = 60.0

# Of each file: modification and change time in nanoseconds, size, inode.
Stamp = tuple[tuple[int, int, int, int], ...]
Load = Callable[[Path], AdapterWeights]
# The digest, what came of it, seconds it took.
OnLoaded = Callable[[str, "AdapterWeights | RemoraError", float], None]


class AdapterFiles(Protocol):
    """What loading needs to know of an adapter; `directory.Registered` is one."""

    @property
    def digest(self) -> str: ...
    @property
    def directory(self) -> Path: ...


class Loads(Protocol):
    """What the bank needs of a loader."""

    def start(self, adapter: AdapterFiles) -> bool:
        """False when enough is in flight, this one already, or it is closed. Answers later through
        OnLoaded. Any thread."""
        ...

    def finished(self, digest: str) -> None:
        """The bank has taken the result."""
        ...

    def freed(self) -> None:
        """Adapters have left memory for good; the system gets it back soon."""
        ...


@dataclass(frozen=True)
class _Broken:
    stamp: Stamp
    error: RemoraError
    read_s: float  # when it was found broken


class Loader:
    """`finished` and `freed` belong to one thread; `on_loaded` is called on the loading thread."""

    def __init__(self, load: Load, on_loaded: OnLoaded, clock: Callable[[], float]) -> None:
        self._read = VerifyingReader(load, clock)
        self._on_loaded = on_loaded
        self._clock = clock
        self._lock = threading.Lock()
        self._closed = False
        self._in_flight: set[str] = set()
        self._giving_back: Future[None] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="adapter-loader")

    def start(self, adapter: AdapterFiles) -> bool:
        with self._lock:
            full = len(self._in_flight) >= MAX_IN_FLIGHT
            if self._closed or full or adapter.digest in self._in_flight:
                return False
            self._in_flight.add(adapter.digest)
            future = self._pool.submit(self._timed_read, adapter)
        future.add_done_callback(lambda f: self._done(adapter.digest, f))
        return True

    def finished(self, digest: str) -> None:
        with self._lock:
            self._in_flight.discard(digest)

    def freed(self) -> None:
        queued = self._giving_back
        if queued is None or queued.running() or queued.done():
            self._giving_back = self._pool.submit(give_back)

    def close(self) -> None:
        """Waits for the file being read; what has not begun is dropped."""
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _timed_read(self, adapter: AdapterFiles) -> tuple[AdapterWeights, float]:
        began = self._clock()
        weights = self._read(adapter.digest, adapter.directory)
        return weights, self._clock() - began

    def _done(self, digest: str, future: Future[tuple[AdapterWeights, float]]) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if error is None:
            self._on_loaded(digest, *future.result())
        elif isinstance(error, RemoraError):
            self._on_loaded(digest, error, 0.0)
        else:
            fault = InternalFault(f"loading adapter {short(digest)} failed: {error!r}")
            fault.__cause__ = error
            self._on_loaded(digest, fault, 0.0)


class VerifyingReader:
    """Reads weights, checks that they are the registered bytes, remembers broken files: until they
    change, or for `retry_s`, as a disk may have been at fault, or a clock."""

    def __init__(self, load: Load, clock: Callable[[], float], retry_s: float = RETRY_S) -> None:
        self._load = load
        self._clock = clock
        self._retry_s = retry_s
        self._broken: OrderedDict[str, _Broken] = OrderedDict()

    def __call__(self, digest: str, directory: Path) -> AdapterWeights:
        """Raises ArtifactInvalid, AdapterInvalid, Incompatible, as it did before when the files
        have not changed since. The weights are those of `digest` or none."""
        stamp, now = _stamp(directory), self._clock()
        known = self._broken.get(digest)
        if known is not None and known.stamp == stamp and now - known.read_s < self._retry_s:
            raise anew(known.error)
        try:
            weights = self._load(directory)
            if weights.digest != digest:
                raise ArtifactInvalid(
                    f"{directory} now holds adapter {short(weights.digest)}, registered was "
                    f"{short(digest)}; register it under a new revision"
                )
        except Exhausted:
            raise  # says nothing about the files
        except RemoraError as e:
            self._remember(digest, _Broken(stamp, anew(e), now))
            raise
        self._broken.pop(digest, None)
        return weights

    def _remember(self, digest: str, broken: _Broken) -> None:
        log.warning("adapter.broken", extra={"digest": digest, "error": str(broken.error)})
        self._broken[digest] = broken
        self._broken.move_to_end(digest)
        if len(self._broken) > MAX_REMEMBERED:
            self._broken.popitem(last=False)


def _stamp(directory: Path) -> Stamp:
    """Of the files that `load_weights` reads; one that cannot be looked at counts as zeros."""
    return tuple(_file_stamp(directory / name) for name in (ADAPTER_JSON, WEIGHTS_FILE))


def _file_stamp(path: Path) -> tuple[int, int, int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0, 0, 0  # reading it will say what is wrong
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino
