"""Layouts of checkpoints that are seldom but real: read, and answered as transformers does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from remora_build.checkpoint.directory import SINGLE_FILE
from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_contract.bundle import Bundle
from tests.buildhost.reference import load_reference, reference_logits
from tests.support.checkpoints import make_checkpoint
from tests.support.portable import PortableModel


def test_a_decoder_saved_without_its_head_answers_as_transformers_loads_it(tmp_path):
    """As the Qwen3-Embedding checkpoints are: embed_tokens, layers.0, ..., norm."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "qwen3", tied=True)
    file = checkpoint / SINGLE_FILE
    tensors = {name.removeprefix("model."): value for name, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    answers_as_transformers(checkpoint, tmp_path / "bundle")


def test_a_hub_cache_of_links_and_mixed_shards_is_read(tmp_path):
    """snapshots/REVISION of links to blobs, itself reached by a link; shards of three types."""
    made = make_checkpoint(tmp_path / "made", "llama", shards=3, dtype="bfloat16")
    shards = sorted(made.glob("*.safetensors"))
    for shard, dtype in zip(shards, (torch.float32, torch.float16), strict=False):
        tensors = {n: v.to(dtype) for n, v in load_file(shard).items()}
        save_file(tensors, shard, {"format": "pt"})
    cache = tmp_path / "models--someone--tiny"
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for i, file in enumerate(sorted(made.iterdir())):
        file.rename(cache / "blobs" / str(i))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(i))
    link = tmp_path / "latest"
    link.symlink_to(snapshot)
    bundle = answers_as_transformers(link, tmp_path / "bundle")
    assert bundle.source.name == "someone/tiny"


def answers_as_transformers(checkpoint: Path, out: Path) -> Bundle:
    options = ExportOptions(dtype="float32", max_context=64, golden=False)
    bundle = export_checkpoint(checkpoint, out, options)
    tokens = np.random.default_rng(2).integers(0, 320, (1, 20))
    want = reference_logits(load_reference(checkpoint), tokens)[:, 11:]
    assert np.abs(PortableModel(out).forced(tokens, 12) - want).max() <= 1e-4
    return bundle
