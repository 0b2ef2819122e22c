"""`remora-build edgellm`: what becomes a bundle, whose adapters fit it, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from remora_build.cli import build_app
from remora_build.edgellm.wrap import wrap_engine
from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_build.inspect.bundle import describe_bundle
from remora_build.publish.source import bundle_facts
from remora_contract.bundle import BUNDLE_JSON, FORMAT_VERSION, load_bundle, verify_files
from remora_contract.compat import quant_refusals
from remora_contract.dialects import dialect_refusals, dialects_in
from remora_contract.errors import ArtifactInvalid, Unsupported
from tests.support.checkpoints import make_checkpoint
from tests.support.edgellm import MAX_RANK, write_engine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("edge") / "checkpoint", "qwen3", seed=3)


@pytest.fixture
def engine(tmp_path, checkpoint):
    return write_engine(tmp_path / "engine", checkpoint / "tokenizer.json")


def test_an_engine_folder_becomes_a_bundle_of_all_its_files(tmp_path, checkpoint, engine):
    (engine / "lm_head").mkdir()
    (engine / "lm_head" / "weights.bin").write_bytes(b"w" * 100)
    arguments = ["edgellm", engine, tmp_path / "out", "--checkpoint", checkpoint, "--sm", 87]
    done = CliRunner().invoke(build_app(), [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    bundle = load_bundle(tmp_path / "out")
    assert json.loads(done.stdout)["digest"] == bundle.digest
    verify_files(tmp_path / "out", bundle.files)
    paths = {f.path for f in bundle.files}
    assert {"edgellm/llm.engine", "edgellm/lm_head/weights.bin"} <= paths
    assert "tokenizer/tokenizer.json" in paths
    assert (bundle.graph.context, bundle.graph.max_bank_rank) == (256, MAX_RANK)
    assert bundle.notes["edgellm"] == {"max_input_len": 128, "sm": 87}
    shown = dict(describe_bundle(tmp_path / "out").facts)
    assert "engine folder of TensorRT Edge-LLM" in shown["graph"]
    assert "not quantized" not in shown["weights"]
    assert shown["adapter bank"] == f"none: one adapter at a time, of rank {MAX_RANK} at most"


def test_adapters_of_the_checkpoints_exports_fit_it(tmp_path, checkpoint, engine):
    """By the base's digest, which an export makes of the same tensors."""
    wrapped = wrap_engine(engine, tmp_path / "edge", checkpoint=checkpoint)
    exported = export_checkpoint(checkpoint, tmp_path / "onnx", ExportOptions(golden=False))
    assert wrapped.base_digest == exported.base_digest
    assert wrapped.decoder == exported.decoder


def test_a_controller_offers_it_to_devices_with_the_backend_alone(tmp_path, checkpoint, engine):
    facts = bundle_facts(wrap_engine(engine, tmp_path / "edge", checkpoint=checkpoint))
    dialects = dialects_in(facts)
    assert dialect_refusals(dialects, {"edgellm": "0.11.0"}) == []
    (refusal,) = dialect_refusals(dialects, {"tensorrt": "10.16", "onnxruntime": "1.24"})
    assert "edgellm >= 0.11" in refusal.need
    assert quant_refusals("none", facts["quant"])
    assert "tensorrt_memory" not in facts, "its own runtime knows what it takes"


def test_what_is_no_engine_folder_is_refused(tmp_path, checkpoint, engine):
    (engine / "config.json").write_text('{"builder_config": {"max_kv_cache_capacity": "many"}}')
    with pytest.raises(ArtifactInvalid, match="max_kv_cache_capacity is 'many'"):
        wrap_engine(engine, tmp_path / "out", checkpoint=checkpoint)
    (engine / "llm.engine").unlink()
    with pytest.raises(ArtifactInvalid, match=r"it has no llm\.engine"):
        wrap_engine(engine, tmp_path / "out", checkpoint=checkpoint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["spec_draft.engine", "visual/", "audio/"])
def test_engines_with_more_than_a_text_decoder_are_refused(tmp_path, checkpoint, engine, part):
    if part.endswith("/"):
        (engine / part).mkdir()
    else:
        (engine / part).write_bytes(b"x")
    with pytest.raises(Unsupported, match=part.rstrip("/")):
        wrap_engine(engine, tmp_path / "out", checkpoint=checkpoint)


def test_the_dialect_and_the_format_belong_together(tmp_path, checkpoint, engine):
    bundle = wrap_engine(engine, tmp_path / "out", checkpoint=checkpoint)
    assert (tmp_path / "out" / BUNDLE_JSON).is_file()
    with pytest.raises(ValueError, match="dialect edgellm belongs to format version 4"):
        replace(bundle, format_version=FORMAT_VERSION)
