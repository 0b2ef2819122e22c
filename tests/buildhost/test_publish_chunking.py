"""Chunks give the file back, keep their bounds, and stay the same around an insertion."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remora_build.publish import chunking
from remora_build.publish.chunking import MAX_BYTES, MIN_BYTES, NORMAL_BYTES, cut_length, split
from remora_contract.artifact import MAX_CHUNK_BYTES

PINNED_LENGTHS = [1114187, 1084556, 1382938, 1052183]  # of the 64-bit numbers 0, 1, 2, …


def chunks_of(data: bytes) -> list[bytes]:
    return [bytes(piece) for piece in split(io.BytesIO(data))]


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


@given(st.integers(0, 3 * MAX_BYTES), st.integers(0, 1000), st.sampled_from([1, 7, 4096]))
@settings(max_examples=12)
def test_chunks_give_the_bytes_back_within_bounds(size: int, seed: int, repeat: int) -> None:
    data = (noise(size // repeat + 1, seed) * repeat)[:size]
    pieces = chunks_of(data)
    assert b"".join(pieces) == data
    assert all(MIN_BYTES <= len(p) <= MAX_BYTES for p in pieces[:-1])
    assert all(0 < len(p) <= MAX_BYTES <= MAX_CHUNK_BYTES for p in pieces[-1:])


@pytest.mark.parametrize("byte", [b"\0", b"\xff", b"a"])
def test_constant_bytes_still_end_chunks(byte: bytes) -> None:
    assert {len(p) for p in chunks_of(byte * (2 * MAX_BYTES))} == {MAX_BYTES}


@pytest.mark.parametrize("size", [0, 1, MIN_BYTES - 1, MIN_BYTES])
def test_a_small_file_is_one_chunk_or_none(size: int) -> None:
    assert chunks_of(noise(size)) == ([noise(size)] if size else [])


def test_chunks_average_about_one_mebibyte() -> None:
    sizes = [len(p) for p in chunks_of(noise(64 << 20))]
    assert NORMAL_BYTES / 2 < np.mean(sizes) < 2 * NORMAL_BYTES


@pytest.mark.parametrize("inserted", [1, 2, 1000, 100_000])
@pytest.mark.parametrize("position", [0, 10 << 20])
def test_an_insertion_changes_few_chunks(inserted: int, position: int) -> None:
    data = noise(24 << 20)
    after = data[:position] + noise(inserted, seed=1) + data[position:]
    before_chunks = set(chunks_of(data))
    new = [p for p in chunks_of(after) if p not in before_chunks]
    assert len(new) <= 4
    assert len(before_chunks) > 15


def test_a_cut_depends_on_the_bytes_alone_and_never_changes() -> None:
    """The rule is part of the repository format: other numbers would re-ship every artifact."""
    lengths = [len(p) for p in chunks_of(bytes(np.arange(8 << 20, dtype=np.uint64).view(np.uint8)))]
    assert lengths[:4] == PINNED_LENGTHS
    assert sum(lengths) == 64 << 20


def test_a_window_hash_is_the_rolling_gear_hash() -> None:
    data = noise(300)
    rolling, expected = 0, []
    for byte in data:
        rolling = ((rolling << 1) + int(chunking._GEAR[byte])) & 0xFFFFFFFF
        expected.append(rolling)
    got = chunking._window_hashes(np.frombuffer(data, np.uint8))
    assert got.tolist() == expected[31:]


def test_the_first_cut_is_where_the_rule_says() -> None:
    """Byte by byte, the definition in the module's docstring."""
    data = noise(3 << 20, seed=4)
    rolling, want = 0, len(data)
    for i, byte in enumerate(data):
        rolling = ((rolling << 1) + int(chunking._GEAR[byte])) & 0xFFFFFFFF
        length = i + 1
        bits = 22 if length < NORMAL_BYTES else 18
        if length >= MIN_BYTES and rolling >> (32 - bits) == 0:
            want = length
            break
    assert cut_length(np.frombuffer(data, np.uint8)) == want


class _Trickle(io.RawIOBase):
    """Gives at most 1000 bytes a read, as a pipe may."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readinto(self, view: memoryview) -> int:  # type: ignore[override]
        return self._data.readinto(view[:1000])


def test_short_reads_do_not_move_the_cuts() -> None:
    data = noise(5 << 20)
    assert [bytes(p) for p in split(_Trickle(data))] == chunks_of(data)  # type: ignore[arg-type]
