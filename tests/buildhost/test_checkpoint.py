"""Damaged, incomplete and hostile checkpoints are refused by the name of what is wrong."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from remora_build.checkpoint.directory import INDEX_FILE, SINGLE_FILE
from remora_build.checkpoint.safetensors_file import MAX_HEADER_BYTES, read_entries
from remora_build.checkpoint.stream import TensorStream
from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_contract.digests import digest_bytes
from remora_contract.errors import CheckpointInvalid, RemoraError, Unsupported
from tests.support.checkpoints import edit_config, make_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "in" / "checkpoint", "qwen3")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "in" / "checkpoint", "qwen3", shards=3)


def refused(checkpoint: Path, error: type[RemoraError], *words: str) -> None:
    """The export raises `error`, its text has all the words, and nothing is left behind."""
    out = checkpoint.parent.parent / "out"
    with pytest.raises(error) as caught:
        export_checkpoint(checkpoint, out / "bundle", ExportOptions(golden=False))
    for word in words:
        assert word in str(caught.value)
    assert not out.exists() or not list(out.iterdir())


def shard_of(checkpoint: Path, number: int) -> Path:
    return sorted(checkpoint.glob("model-*.safetensors"))[number]


def write_file(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def change_tensors(checkpoint: Path, change) -> None:
    path = checkpoint / SINGLE_FILE
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    "name", ["model-00002-of-00004.safetensors", INDEX_FILE, "generation_config.json"]
)
def test_a_pipe_in_place_of_a_file_is_not_waited_for(sharded, name):
    (sharded / name).unlink()
    os.mkfifo(sharded / name)
    refused(sharded, CheckpointInvalid, name, "is no file")


@pytest.mark.parametrize(
    "name", ["generation_config.json", "tokenizer.json", "chat_template.jinja", SINGLE_FILE]
)
def test_a_link_to_nothing_is_no_file_that_is_left_out(checkpoint, name):
    """As in a cache of which a part was deleted: without it answers would end otherwise."""
    (checkpoint / name).unlink()
    (checkpoint / name).symlink_to("../blobs/deleted")
    refused(checkpoint, CheckpointInvalid, name, "link to nothing")


def test_a_truncated_shard_is_named(sharded):
    shard = shard_of(sharded, 1)
    shard.write_bytes(shard.read_bytes()[:-10])
    refused(sharded, CheckpointInvalid, shard.name, "truncated")


def test_a_missing_shard_is_named(sharded):
    shard = shard_of(sharded, 2)
    shard.unlink()
    refused(sharded, CheckpointInvalid, shard.name, "missing")


def test_a_tensor_the_index_promises_and_no_shard_holds_is_named(sharded):
    index = json.loads((sharded / INDEX_FILE).read_text())
    index["weight_map"]["model.ghost.weight"] = shard_of(sharded, 0).name
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    refused(sharded, CheckpointInvalid, "model.ghost.weight", shard_of(sharded, 0).name)


def test_a_tensor_beside_the_index_is_named(sharded):
    index = json.loads((sharded / INDEX_FILE).read_text())
    del index["weight_map"]["model.norm.weight"]
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    refused(sharded, CheckpointInvalid, "model.norm.weight")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".x.safetensors"]
)
def test_an_index_never_leads_outside_the_directory(sharded, name):
    index = json.loads((sharded / INDEX_FILE).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    refused(sharded, CheckpointInvalid, INDEX_FILE, "model.norm.weight")


def test_a_missing_tensor_is_named(checkpoint):
    change_tensors(checkpoint, lambda t: t.pop("model.layers.1.self_attn.k_norm.weight"))
    refused(checkpoint, CheckpointInvalid, "model.layers.1.self_attn.k_norm.weight")


def test_a_tensor_of_another_shape_is_named(checkpoint):
    name = "model.layers.0.mlp.down_proj.weight"
    change_tensors(checkpoint, lambda t: t.update({name: t[name].T.copy()}))
    refused(checkpoint, CheckpointInvalid, name, "[96, 64]", "[64, 96]")


def test_an_unexpected_tensor_is_not_dropped_silently(checkpoint):
    name = "model.layers.0.self_attn.q_proj.bias"
    change_tensors(checkpoint, lambda t: t.update({name: np.zeros(64, np.float32)}))
    refused(checkpoint, CheckpointInvalid, name)


def test_a_derived_rope_table_of_old_checkpoints_is_left_out(checkpoint, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(checkpoint, lambda t: t.update({name: np.zeros(8, np.float32)}))
    export_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions(golden=False))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(checkpoint, bad):
    name = "model.layers.0.self_attn.v_proj.weight"

    def spoil(tensors):
        tensors[name][3, 5] = bad

    change_tensors(checkpoint, spoil)
    refused(checkpoint, CheckpointInvalid, name, "NaN or infinity")


def test_a_weight_beyond_float16_is_named_and_float32_offered(checkpoint, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"

    def enlarge(tensors):
        tensors[name][0, 0] = 70000

    change_tensors(checkpoint, enlarge)
    refused(checkpoint, CheckpointInvalid, name, "--dtype float32")
    options = ExportOptions(dtype="float32", golden=False)
    export_checkpoint(checkpoint, tmp_path / "bundle", options)


def test_tied_embeddings_beside_another_head_are_refused(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "in" / "checkpoint", "qwen2", tied=True)
    change_tensors(checkpoint, lambda t: t.update({"lm_head.weight": np.zeros((320, 64), "f4")}))
    refused(checkpoint, CheckpointInvalid, "tie_word_embeddings", "lm_head.weight")


def test_a_stored_copy_of_the_tied_embedding_changes_nothing(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "qwen2", tied=True)
    options = ExportOptions(golden=False)
    plain = export_checkpoint(checkpoint, tmp_path / "a", options)

    def copy(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    change_tensors(checkpoint, copy)
    assert export_checkpoint(checkpoint, tmp_path / "b", options) == plain


def test_pickled_weights_are_refused_with_the_way_out(checkpoint):
    (checkpoint / SINGLE_FILE).rename(checkpoint / "pytorch_model.bin")
    refused(checkpoint, Unsupported, "safe_serialization")


def test_an_adapter_directory_is_told_apart(checkpoint):
    (checkpoint / "config.json").rename(checkpoint / "adapter_config.json")
    refused(checkpoint, CheckpointInvalid, "remora-build adapter")


def test_a_vocabulary_of_absurd_size_takes_no_memory(checkpoint):
    edit_config(checkpoint, vocab_size=1 << 40)
    refused(checkpoint, CheckpointInvalid, "vocab_size")


HEADERS = {
    "claims more than the format allows": (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}",
    "longer than the file": struct.pack("<Q", 500) + b"{}",
    "too short to be a header": b"\x01\x00",
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS.keys())
def test_a_header_is_bounded_before_it_is_read(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointInvalid, match=r"x\.safetensors"):
        read_entries(path)


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BAD_ENTRIES = {
    "offsets that do not fit the shape": {"a": tensor(shape=(3,))},
    "an overlap": {"a": tensor(), "b": tensor(shape=(1,), offsets=(4, 8))},
    "a hole": {"a": tensor(offsets=(8, 16))},
    "a negative size": {"a": tensor(shape=(-2,), offsets=(0, 8))},
    "three offsets": {"a": tensor(offsets=(0, 8, 9))},
    "a size that is no number": {"a": tensor(shape=("2",))},
    "an enormous shape": {"a": tensor(shape=(1 << 47, 1 << 47))},
    "a missing key": {"a": {"dtype": "F32"}},
    "an entry that is no object": {"a": 3},
}


@pytest.mark.parametrize("header", BAD_ENTRIES.values(), ids=BAD_ENTRIES.keys())
def test_a_header_that_lies_is_refused(tmp_path, header):
    path = tmp_path / "x.safetensors"
    write_file(path, json.dumps(header).encode(), bytes(8))
    with pytest.raises(CheckpointInvalid, match=r"x\.safetensors"):
        read_entries(path)


@pytest.mark.parametrize("header", [b"[1, 2]", b"null", b"{", b'{"a": 1, "a": 2}', b"[" * 100_000])
def test_a_header_that_is_no_object_is_refused(tmp_path, header):
    path = tmp_path / "x.safetensors"
    write_file(path, header)
    with pytest.raises(CheckpointInvalid):
        read_entries(path)


def test_integer_weights_are_refused_by_their_dtype(tmp_path):
    path = tmp_path / "x.safetensors"
    write_file(path, json.dumps({"a": tensor(dtype="I8", shape=(8,))}).encode(), bytes(8))
    with pytest.raises(Unsupported, match="I8"):
        read_entries(path)


@pytest.mark.parametrize("chunk_bytes", [1, 12, 100, 1 << 20])
def test_a_stream_reads_every_row_once_and_hashes_the_bytes(tmp_path, chunk_bytes):
    values = np.arange(35, dtype=np.float32).reshape(7, 5)
    save_file({"other": np.zeros(3, np.float32), "w": values}, tmp_path / "x.safetensors")
    entry = read_entries(tmp_path / "x.safetensors")["w"]
    with TensorStream(chunk_bytes) as stream:
        parts = [(first, rows.copy()) for first, rows in stream.rows(entry)]
    assert (np.concatenate([rows for _, rows in parts]) == values).all()
    assert [first for first, _ in parts] == list(range(0, 7, len(parts[0][1])))
    assert stream.digests["w"] == digest_bytes(values.tobytes())


def renamed(checkpoint: Path, old: str, new: str) -> None:
    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace(old, new, 1)] = tensors.pop(name)

    change_tensors(checkpoint, rename)


def test_tensors_under_another_prefix_are_recognised(checkpoint):
    renamed(checkpoint, "model.", "transformer.")
    word = "it has transformer.embed_tokens.weight"
    refused(checkpoint, CheckpointInvalid, "model.embed_tokens.weight", word)


def test_an_untied_decoder_without_its_head_is_refused(tmp_path):
    """transformers would make one up."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "qwen3", tied=False)
    change_tensors(checkpoint, lambda tensors: tensors.pop("lm_head.weight"))
    renamed(checkpoint, "model.", "")
    refused(checkpoint, CheckpointInvalid, "lacks lm_head.weight")
