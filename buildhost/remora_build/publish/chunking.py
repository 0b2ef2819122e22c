"""Content-defined chunking: where to cut a file so that equal content gives equal chunks, whatever
was inserted before it. Owns the cut rule; writes nothing.

Gear hash with normalised chunking, after Xia et al., "FastCDC: a Fast and Efficient
Content-Defined Chunking Approach for Data Deduplication" (USENIX ATC 2016). With 32-bit words the
gear hash h_i = (h_(i-1) << 1) + G[byte_i] forgets a byte after 32 steps, so it is

    h_i = sum over j in 0..31 of G[byte_(i-j)] << j      (mod 2^32)

a sum over a window, which doubling computes for a whole block in five vector steps:
window 2w = window w + (window w, shifted back by w) << w.

A chunk ends where the top bits of h are zero: 22 bits before NORMAL_BYTES, 18 after it, so sizes
gather around 1 MiB. The first MIN_BYTES of a chunk are never looked at, MAX_BYTES ends it anyway.
The table and these numbers are fixed for ever: changing one would re-ship every artifact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

MIN_BYTES = 256 << 10
NORMAL_BYTES = 1 << 20
MAX_BYTES = 4 << 20

_WINDOW = 32
_STRICT = np.uint32(0xFFFFFC00)  # top 22 bits
_LOOSE = np.uint32(0xFFFFC000)  # top 18 bits
_STRIDE = 64 << 10  # bytes hashed at once: the temporaries stay in the second-level cache
_BUFFER_BYTES = 4 * MAX_BYTES
_GEAR = np.array(
    [
        int.from_bytes(hashlib.sha256(b"remora gear %d" % i).digest()[:4], "little")
        for i in range(256)
    ],
    dtype=np.uint32,
)


def cut_length(data: NDArray[np.uint8]) -> int:
    """Length of the first chunk of `data` (bytes).

    `data` holds at least MAX_BYTES, or all that is left of the file.
    """
    size = min(len(data), MAX_BYTES)
    for start in range(MIN_BYTES, size, _STRIDE):
        stop = min(start + _STRIDE, size)
        hashes = _window_hashes(data[start - _WINDOW : stop - 1])
        for i in np.flatnonzero((hashes & _LOOSE) == 0):
            length = start + int(i)
            if length >= NORMAL_BYTES or hashes[i] & _STRICT == 0:
                return length
    return size


def split(stream: BinaryIO) -> Iterator[memoryview]:
    """The stream's chunks in order; each is valid until the next is asked for.

    Takes 16 MiB of memory whatever the stream's length. OSError from the stream passes through.
    """
    buffer = bytearray(_BUFFER_BYTES)
    view, data = memoryview(buffer), np.frombuffer(buffer, np.uint8)
    start = end = 0
    at_end = False
    while True:
        if end - start < MAX_BYTES and not at_end:
            view[: end - start] = bytes(view[start:end])
            start, end = 0, end - start
            end, at_end = _fill(stream, view, end)
        if start == end:
            return
        length = cut_length(data[start:end])
        yield view[start : start + length]
        start += length


def _window_hashes(data: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Element i: gear hash of data[i : i + 32]; 31 elements fewer than `data`."""
    hashes = _GEAR[data]
    for width in (1, 2, 4, 8, 16):
        older = hashes[:-width] << np.uint32(width)
        older += hashes[width:]
        hashes = older
    return hashes


def _fill(stream: BinaryIO, view: memoryview, end: int) -> tuple[int, bool]:
    """Reads until the buffer is full or the stream ends; returns (end of data, stream ended)."""
    while end < len(view):
        count = stream.readinto(view[end:])  # type: ignore[attr-defined]
        if not count:
            return end, True
        end += count
    return end, False
