"""Kernels that TensorRT for RTX compiles where an engine is loaded, kept for the next start.

    FILE   sha256 of the rest, 32 bytes; then what IRuntimeCache.serialize gave

TensorRT itself refuses a cache of another version, GPU or driver. A file that is damaged or too
large does not reach it. Whatever goes wrong here costs time at the next start and nothing else.
"""

from __future__ import annotations

import hashlib
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

MAX_BYTES = 64 << 20
_DIGEST_BYTES = 32


class KernelCache:
    """One for all contexts of an engine's plans; must live as long as they do."""

    def __init__(self, path: Path) -> None:
        """`path`: the file, whose folder exists as long as the engine is wanted."""
        self._path = path
        self._cache: Any = None
        self._kept: bytes | None = None  # what the file holds

    def config(self, trt: Any, engine: Any) -> Any:
        """How a context of `engine` is made: it brings no memory, and compiles what is not here."""
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if self._cache is None:
            self._cache = self._opened(config.create_runtime_cache())
        if not config.set_runtime_cache(self._cache):
            log.warning("engine.kernels_not_used", extra={"path": str(self._path)})
        return config

    def keep(self) -> None:
        """Writes what has been compiled so far, where that is more than the file holds."""
        if self._cache is None:
            return
        data = self._serialized()
        if data is None or data == self._kept:
            return
        if len(data) > MAX_BYTES:
            self._warn("engine.kernels_too_large", bytes=len(data))
            return
        partial = self._path.with_name(f"{self._path.name}.partial")
        try:
            partial.write_bytes(hashlib.sha256(data).digest() + data)
            partial.replace(self._path)
        except OSError as e:
            self._warn("engine.kernels_not_kept", reason=e.strerror or str(e))
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            return
        self._kept = data

    def _opened(self, cache: Any) -> Any:
        """`cache` with what the file holds, or empty."""
        data = self._stored()
        if data is not None and cache.deserialize(data):
            self._kept = data
        elif data is not None:
            self._warn("engine.kernels_refused", reason="of another version, GPU or driver")
        return cache

    def _stored(self) -> bytes | None:
        try:
            with self._path.open("rb") as file:
                data = file.read(_DIGEST_BYTES + MAX_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as e:
            self._warn("engine.kernels_refused", reason=e.strerror or str(e))
            return None
        digest, rest = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if len(rest) > MAX_BYTES or hashlib.sha256(rest).digest() != digest:
            self._warn("engine.kernels_refused", reason="the file is damaged or too large")
            return None
        return rest

    def _serialized(self) -> bytes | None:
        host = self._cache.serialize()
        if host is None:
            self._warn("engine.kernels_not_kept", reason="TensorRT does not serialise its cache")
            return None
        return bytes(memoryview(host))

    def _warn(self, event: str, **extra: object) -> None:
        log.warning(event, extra={"path": str(self._path), **extra})
