"""Freed memory goes back to the system. Knows glibc; elsewhere nothing happens.

glibc keeps blocks of up to 32 MiB for reuse once one of that size has been freed. On a device whose
memory everything shares, an adapter that was unloaded or an engine that was closed must not stay
counted as ours.
"""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Takes milliseconds, during which other threads may wait for memory: not on a step thread."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    if trim is not None:
        trim(ctypes.c_size_t(0))
