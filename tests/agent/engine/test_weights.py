"""Adapter bytes from outside: bounded, verified, then used."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from remora_agent.bank.weights import load_weights
from remora_contract.adapter import ADAPTER_JSON, WEIGHTS_FILE, load_adapter
from remora_contract.bundle import Bundle, load_bundle
from remora_contract.digests import canonical_json, digest_bytes
from remora_contract.errors import AdapterInvalid, ArtifactInvalid, DocumentInvalid, Incompatible
from remora_contract.targets import AdapterTarget
from tests.agent.engine.portable import QWEN2, random_bundle
from tests.support.adapters import random_tensors, write_sidecar

MARKER = (1234.5, -777.25, 65504.0, -65504.0)  # float16 holds them all; the last two are its ends


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(random_bundle(tmp_path_factory.mktemp("b") / "bundle"))


@pytest.fixture
def sidecar(tmp_path: Path, bundle: Bundle) -> Path:
    write_sidecar(tmp_path / "adapter", bundle.base_digest, random_tensors(QWEN2, seed=1, r=3))
    return tmp_path / "adapter"


def rewrite(sidecar: Path, data: bytes) -> None:
    """Replaces the weight file and declares its new size and digest, as its maker would."""
    (sidecar / WEIGHTS_FILE).write_bytes(data)
    adapter = load_adapter(sidecar)
    file = replace(adapter.files[0], size=len(data), digest=digest_bytes(data))
    (sidecar / ADAPTER_JSON).write_bytes(canonical_json(replace(adapter, files=(file,))))


def edit_header(sidecar: Path, change) -> None:
    data = (sidecar / WEIGHTS_FILE).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    rewrite(sidecar, struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_converted_adapter_loads_as_it_was_written(tmp_path: Path, bundle: Bundle, dtype: str):
    tensors = random_tensors(QWEN2, seed=1, r=5, projections=("q", "down"))
    written = write_sidecar(tmp_path / "x", bundle.base_digest, tensors, dtype=dtype)
    weights = load_weights(tmp_path / "x", bundle)
    assert weights.digest == written.digest
    assert set(weights.tensors) == set(tensors)
    for target, (a, b) in tensors.items():
        assert np.array_equal(weights.tensors[target][0], a.astype(dtype))
        assert np.array_equal(weights.tensors[target][1], b.astype(dtype))
    assert weights.rank == 5 and weights.rank_of("q") == 5 and weights.rank_of("k") == 0


def test_an_adapter_for_another_base_is_refused(tmp_path: Path, bundle: Bundle):
    other = digest_bytes(b"another checkpoint")
    write_sidecar(tmp_path / "x", other, random_tensors(QWEN2, seed=1))
    with pytest.raises(Incompatible, match="adapter_base"):
        load_weights(tmp_path / "x", bundle)


def test_more_rank_than_the_bank_is_refused_before_reading(sidecar: Path, bundle: Bundle):
    (sidecar / WEIGHTS_FILE).unlink()
    small = replace(bundle, graph=replace(bundle.graph, max_bank_rank=2))
    with pytest.raises(Incompatible, match="adapter_rank: needs rank <= 2, has rank 3"):
        load_weights(sidecar, small)


def test_a_truncated_file_is_named(sidecar: Path, bundle: Bundle):
    path = sidecar / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ArtifactInvalid, match="truncated"):
        load_weights(sidecar, bundle)


def test_a_changed_byte_is_noticed(sidecar: Path, bundle: Bundle):
    data = bytearray((sidecar / WEIGHTS_FILE).read_bytes())
    data[-1] ^= 1
    (sidecar / WEIGHTS_FILE).write_bytes(data)
    with pytest.raises(ArtifactInvalid, match="damaged"):
        load_weights(sidecar, bundle)


@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
def test_what_is_no_file_is_refused_at_once(sidecar: Path, bundle: Bundle, kind: str):
    path = sidecar / WEIGHTS_FILE
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)  # nobody ever writes to it
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(ArtifactInvalid, match=r"truncated|cannot be read"):
        load_weights(sidecar, bundle)


def test_a_missing_file_is_named(sidecar: Path, bundle: Bundle):
    (sidecar / WEIGHTS_FILE).unlink()
    with pytest.raises(ArtifactInvalid, match=WEIGHTS_FILE):
        load_weights(sidecar, bundle)


def test_a_file_larger_than_its_targets_need_is_not_read(sidecar: Path, bundle: Bundle):
    path = sidecar / WEIGHTS_FILE
    size = 1 << 40
    with path.open("r+b") as f:
        f.truncate(size)
    adapter = load_adapter(sidecar)
    file = replace(adapter.files[0], size=size)
    (sidecar / ADAPTER_JSON).write_bytes(canonical_json(replace(adapter, files=(file,))))
    with pytest.raises(ArtifactInvalid):
        load_weights(sidecar, bundle)


def test_a_declared_target_without_a_tensor_is_refused(sidecar: Path, bundle: Bundle):
    edit_header(sidecar, lambda header: header.pop("layers.1.o.b"))
    with pytest.raises(AdapterInvalid, match=r"layers\.1\.o\.b"):
        load_weights(sidecar, bundle)


def test_a_tensor_that_no_target_takes_is_refused(sidecar: Path, bundle: Bundle):
    edit_header(sidecar, lambda h: h.update({"layers.7.q.a": dict(h["layers.0.q.a"])}))
    with pytest.raises(AdapterInvalid, match=r"no declared target takes tensor 'layers\.7\.q\.a'"):
        load_weights(sidecar, bundle)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": [3, 64]}, "shape"),
        ({"shape": "x" * 5000}, "shape"),
        ({"dtype": "F64"}, "F32"),
        ({"data_offsets": [0, 5]}, "byte range"),
        ({"data_offsets": [-4, 5]}, "byte range"),
        ({"data_offsets": [1 << 40, (1 << 40) + 768]}, "byte range"),
        ({"data_offsets": [True, False]}, "byte range"),
        ({"data_offsets": None}, "byte range"),
    ],
)
def test_a_lying_header_is_refused_by_tensor(sidecar: Path, bundle: Bundle, change, words: str):
    edit_header(sidecar, lambda header: header["layers.0.q.a"].update(change))
    with pytest.raises(AdapterInvalid, match=words):
        load_weights(sidecar, bundle)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01\x02",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 4) + b"nope",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 200000) + b"[" * 200000,
    ],
)
def test_bytes_that_are_no_safetensors_file_are_refused(sidecar: Path, bundle: Bundle, data: bytes):
    rewrite(sidecar, data)
    with pytest.raises((AdapterInvalid, ArtifactInvalid)):
        load_weights(sidecar, bundle)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_numbers_that_are_not_finite_are_refused(
    tmp_path: Path, bundle: Bundle, bad: float, which: int, dtype: str
):
    tensors = random_tensors(QWEN2, seed=1)
    tensors[AdapterTarget(1, "up")][which][-1, -4:] = MARKER
    write_sidecar(tmp_path / "x", bundle.base_digest, tensors, dtype=dtype)
    data = (tmp_path / "x" / WEIGHTS_FILE).read_bytes()
    marker = np.array(MARKER, dtype).tobytes()
    poisoned = np.array([*MARKER[:-1], bad], dtype).tobytes()
    assert data.count(marker) == 1
    rewrite(tmp_path / "x", data.replace(marker, poisoned))
    with pytest.raises(AdapterInvalid, match=r"layers\.1\.up\.[ab].*NaN or infinity"):
        load_weights(tmp_path / "x", bundle)


def test_a_directory_that_is_no_adapter_says_how_to_make_one(tmp_path: Path, bundle: Bundle):
    with pytest.raises(ArtifactInvalid, match="remora-build adapter"):
        load_weights(tmp_path, bundle)


def test_an_adapter_document_with_an_unknown_key_is_refused(sidecar: Path, bundle: Bundle):
    path = sidecar / ADAPTER_JSON
    path.write_text(json.dumps({**json.loads(path.read_text()), "dora": True}))
    with pytest.raises(DocumentInvalid, match="dora"):
        load_weights(sidecar, bundle)
