"""The .npy reader takes what numpy writes and nothing that could cost memory or run code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_build.adapters.formats.npy import open_npy, stored_dtype, write_npy
from remora_contract.errors import AdapterInvalid

MAGIC = b"\x93NUMPY"


def npy_bytes(header: str, data: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    length_bytes = 2 if version[0] == 1 else 4
    return (
        MAGIC
        + bytes(version)
        + len(header).to_bytes(length_bytes, "little")
        + header.encode()
        + data
    )


def header(descr: str = "<f2", shape: str = "(2, 3)", order: str = "False") -> str:
    return f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}"


def read_all(path: Path) -> np.ndarray:
    file = open_npy(path)
    with path.open("rb") as f:
        return file.items(f, 0, int(np.prod(file.shape))).reshape(file.shape)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int32])
@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3), (0,), (5,)])
def test_what_numpy_saves_is_read_back(tmp_path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    assert np.array_equal(read_all(tmp_path / "a.npy"), values)


def test_bfloat16_is_two_byte_void_as_tensorrt_llm_stores_it(tmp_path: Path) -> None:
    values = np.array([[1.5, -2.0, 3e38]], ml_dtypes.bfloat16)
    write_npy(tmp_path / "a.npy", "bfloat16", (1, 3), [values[0]])

    stored = np.load(tmp_path / "a.npy", allow_pickle=False)
    assert stored.dtype == np.dtype("V2")
    assert stored.dtype.str == "|V2"
    assert np.array_equal(stored.view(np.uint16), values.view(np.uint16))
    assert np.array_equal(read_all(tmp_path / "a.npy"), values)


def test_rows_written_one_at_a_time_are_the_bytes_numpy_saves(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float16).reshape(1, 3, 4)
    write_npy(tmp_path / "ours.npy", "float16", values.shape, iter(values[0]))
    np.save(tmp_path / "theirs.npy", values)
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()


def test_a_writer_that_is_given_too_few_rows_notices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 bytes"):
        write_npy(tmp_path / "a.npy", "float16", (2, 2), [np.zeros(2, np.float16)])


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "no .npy file"),
        (b"PK\x03\x04 a zip archive", "no .npy file"),
        (MAGIC + bytes((9, 0)), "no .npy file"),
        (MAGIC + bytes((1, 0)) + b"\xff\xff", "header of 65535 bytes"),
        (MAGIC + bytes((2, 0)) + b"\xff\xff\xff\xff", "header of 4294967295 bytes"),
        (MAGIC + bytes((1, 0)) + b"\x40\x00{'descr'", "truncated inside its header"),
        (npy_bytes("import os"), "not that of a plain array"),
        (npy_bytes("(" * 4000), "not that of a plain array"),
        (npy_bytes(header("|O")), "not that of a plain array"),
        (npy_bytes(header("<f8"), b"\0" * 48), "holds <f8"),
        (npy_bytes(header(">f2"), b"\0" * 12), "holds >f2"),
        (npy_bytes(header("<V3"), b"\0" * 18), "holds <V3"),
        (npy_bytes(header(order="True"), b"\0" * 12), "fortran_order"),
        (npy_bytes(header(), b"\0" * 11), "truncated"),
        (npy_bytes(header(), b"\0" * 13), "damaged"),
        (npy_bytes(header(shape="(99999999999, 99999999999)")), "promises .* truncated"),
        (npy_bytes(header(shape="(9999999999999999999,)")), "cannot be meant"),
        (npy_bytes(header(shape="(1, 1, 1, 1, 1, 1, 1, 1, 1)")), "cannot be meant"),
        (npy_bytes(header(shape="(-1, 2)")), "not that of a plain array"),
        (npy_bytes(header(shape="(1 2)")), "cannot be meant"),
    ],
)
def test_anything_else_is_refused_before_memory_is_taken(
    tmp_path: Path, data: bytes, what: str
) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(data)
    with pytest.raises(AdapterInvalid, match=what) as error:
        open_npy(path)
    assert str(path) in str(error.value)


def test_a_pickled_array_is_never_loaded(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    np.save(tmp_path / "a.npy", np.array([Evil()], object), allow_pickle=True)
    with pytest.raises(AdapterInvalid, match="not that of a plain array"):
        open_npy(tmp_path / "a.npy")
    assert not (tmp_path / "ran").exists()


def test_absent_files_and_pipes_are_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match=r"a\.npy does not exist"):
        open_npy(tmp_path / "a.npy")
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(AdapterInvalid, match="is no file"):
        open_npy(tmp_path / "pipe.npy")


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((2, 3), np.float16))
    file = open_npy(path)
    path.write_bytes(path.read_bytes()[:-2])
    with path.open("rb") as f, pytest.raises(AdapterInvalid, match="ended while it was read"):
        file.items(f, 0, 6)


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 3), np.int32))
    with pytest.raises(AdapterInvalid, match="holds int32"):
        stored_dtype(open_npy(tmp_path / "a.npy"))


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_the_named_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.npy"
    for prefix in (b"", MAGIC + bytes((1, 0))):
        path.write_bytes(prefix + data)
        try:
            open_npy(path)
        except AdapterInvalid as e:
            assert str(path) in str(e)
