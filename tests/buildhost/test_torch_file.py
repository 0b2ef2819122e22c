"""Files of torch.save are read without torch, and a hostile one runs nothing."""

from __future__ import annotations

import io
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remora_build.checkpoint.stream import TensorStream
from remora_build.checkpoint.torch_file import MAX_PICKLE_BYTES, read_torch_entries
from remora_contract.errors import CheckpointInvalid, RemoraError, Unsupported

TENSORS = {
    "base_model.model.a.lora_A.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "base_model.model.a.lora_B.weight": torch.randn(5, 3).to(torch.bfloat16),
    "base_model.model.a.half": torch.randn(7).half(),
    "base_model.model.a.one": torch.ones(1, 1),
}


def archive(path: Path, data: bytes, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("archive/data.pkl", data)
        for name, content in members.items():
            z.writestr(f"archive/data/{name}", content)
    return path


def test_tensors_are_those_that_torch_saved(tmp_path):
    path = tmp_path / "adapter_model.bin"
    parameter = torch.nn.Parameter(torch.randn(2, 2))
    shared = torch.arange(10.0)
    saved = {**TENSORS, "parameter": parameter, "tail": shared[4:], "head": shared[:2]}
    torch.save(saved, path)
    entries = read_torch_entries(path)
    assert set(entries) == set(saved)
    with TensorStream() as stream:
        for name, tensor in saved.items():
            have = stream.whole(entries[name]).astype(np.float32)
            assert np.array_equal(have, tensor.detach().float().numpy()), name


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_would_run_a_command_is_refused_and_runs_nothing(tmp_path, protocol):
    mark = tmp_path / "ran"
    path = archive(tmp_path / "x.bin", pickle.dumps({"a": Evil(mark)}, protocol))
    with pytest.raises(CheckpointInvalid, match=r"names (posix|nt)\.system"):
        read_torch_entries(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"ctorch._utils\n_rebuild_tensor_v3\n.",
        b"ctorch\nload\n.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x05\x00\x00\x00_callX\x01\x00\x00\x00xsb.",
        b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.",
        b"ccollections\nOrderedDict.__init__.__globals__\n.",
    ],
    ids=["eval", "other", "load", "sets-attribute", "changes-class", "dotted"],
)
def test_a_pickle_may_only_put_tensors_together(tmp_path, program):
    with pytest.raises(CheckpointInvalid, match="not run"):
        read_torch_entries(archive(tmp_path / "x.bin", program))


NAMED = b"X\x01\x00\x00\x00a"
TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQK\x00K\x04\x85K\x01\x85\x89}tR"
)


@pytest.mark.parametrize(
    "program",
    [
        b"N" + b"r\xff\xff\xff\x0f.",  # a memo of 2^28 places; in C it is made
        b"}" + b")" + b"\x85" * 3_000_000 + b"Ns.",  # a key that cannot be hashed without end
        b"]" + b"\x85" * 100_000 + b".",
        b"ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsctorch._utils\n"
        b"_rebuild_tensor_v2\nsbNs.",
        b"}" + NAMED + TENSOR + b"}X\x06\x00\x00\x00offsetJ\x00\x00\x00\x80sbs.",
        b"\x96\xff\xff\xff\xff\x0f\x00\x00\x00.",  # a bytearray of 64 GB
        b"\x8f(K\x01\x90.",
    ],
    ids=["memo", "key", "nested", "shadowed", "changed", "bytearray", "set"],
)
def test_a_pickle_takes_neither_memory_nor_the_process(tmp_path, program):
    path = archive(tmp_path / "x.bin", b"\x80\x05" + program, **{"0": bytes(16)})
    script = (
        "import sys; from pathlib import Path\n"
        "from remora_build.checkpoint.torch_file import read_torch_entries\n"
        "from remora_contract.errors import CheckpointInvalid\n"
        "try: read_torch_entries(Path(sys.argv[1]))\n"
        "except CheckpointInvalid: print(Path('/proc/self/status').read_text())\n"
    )
    told = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    peak = re.search(r"VmHWM:\s+(\d+) kB", told.stdout)  # ru_maxrss begins at the parent's
    assert peak is not None and int(peak[1]) < 300 << 10


def test_the_tensor_of_those_programs_is_read_where_nothing_changes_it(tmp_path):
    program = b"\x80\x02}" + NAMED + TENSOR + b"s."
    path = archive(tmp_path / "x.bin", program, **{"0": bytes(16)})
    assert read_torch_entries(path)["a"].shape == (4,)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_a_flipped_byte_gives_the_tensors_or_a_clear_error(tmp_path_factory, at, value):
    buffer = io.BytesIO()
    torch.save(TENSORS, buffer)
    data = bytearray(buffer.getvalue())
    data[at % len(data)] = value
    path = tmp_path_factory.mktemp("flip") / "x.bin"
    path.write_bytes(data)
    try:
        entries = read_torch_entries(path)
    except RemoraError:
        return
    with TensorStream() as stream:
        for entry in entries.values():
            stream.whole(entry)


@pytest.mark.parametrize("keep", [10, 200, 0.5, 0.95])
def test_a_truncated_file_is_a_clear_error(tmp_path, keep):
    path = tmp_path / "x.bin"
    torch.save(TENSORS, path)
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(CheckpointInvalid, match="truncated"):
        read_torch_entries(path)


def test_a_file_from_before_torch_1_6_is_refused(tmp_path):
    path = tmp_path / "x.bin"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointInvalid, match="save the adapter with safetensors"):
        read_torch_entries(path)


def test_a_member_that_unfolds_is_refused(tmp_path):
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("archive/data.pkl", b"\0" * (MAX_PICKLE_BYTES * 4))
    with pytest.raises(CheckpointInvalid, match="compressed"):
        read_torch_entries(path)


def test_sizes_are_held_against_the_file(tmp_path):
    path, short = tmp_path / "x.bin", tmp_path / "short.bin"
    torch.save({"a": torch.zeros(4, 4)}, path)
    with zipfile.ZipFile(path) as z:
        program = z.read(next(n for n in z.namelist() if n.endswith("data.pkl")))
    with pytest.raises(CheckpointInvalid, match="needs 64 bytes"):
        read_torch_entries(archive(short, program, **{"0": b"1234"}))


@pytest.mark.parametrize(
    ("value", "why"),
    [(torch.zeros(2, dtype=torch.int64), "LongStorage"), (torch.zeros(3, 4).T, "transposed")],
)
def test_other_tensors_are_refused_by_name(tmp_path, value, why):
    path = tmp_path / "x.bin"
    torch.save({"a": value}, path)
    with pytest.raises(Unsupported, match=why):
        read_torch_entries(path)


def test_an_entry_that_is_no_tensor_is_named(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.zeros(2), "epoch": 3}, path)
    with pytest.raises(CheckpointInvalid, match="'epoch' is no tensor"):
        read_torch_entries(path)
