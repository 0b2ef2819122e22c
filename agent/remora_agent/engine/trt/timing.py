"""What the builder measured, kept for the next build by the same recipe (`tensorrt` only).

TensorRT itself refuses a cache of another version or GPU; a cache that it refuses is dropped, never
forced on it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

MAX_BYTES = 64 << 20


def use(config: Any, path: Path | None) -> None:
    """Gives the builder what `path` holds, or an empty cache to fill."""
    cache = config.create_timing_cache(_stored(path))
    if cache is None or not config.set_timing_cache(cache, False):
        log.warning("engine.timing_cache_refused", extra={"path": str(path)})
        config.set_timing_cache(config.create_timing_cache(b""), False)


def keep(config: Any, path: Path | None) -> None:
    """Writes what the builder knows now; not at all when it is too large."""
    cache = config.get_timing_cache()
    if path is None or cache is None:
        return
    data = memoryview(cache.serialize())
    if data.nbytes > MAX_BYTES:
        log.warning("engine.timing_cache_too_large", extra={"bytes": data.nbytes})
        return
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    partial.replace(path)


def _stored(path: Path | None) -> bytes:
    if path is None or not path.is_file() or path.stat().st_size > MAX_BYTES:
        return b""
    return path.read_bytes()
