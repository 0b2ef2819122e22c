"""A bundle appears whole or not at all, says what it holds, and is the same every time."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from typer.testing import CliRunner

from remora_build.cli import build_app
from remora_build.export import exporter
from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_contract.bundle import BUNDLE_JSON, load_bundle, verify_files
from remora_contract.errors import (
    CheckpointInvalid,
    Conflict,
    Exhausted,
    RequestInvalid,
    Unsupported,
)
from tests.support.checkpoints import edit_config, make_checkpoint

REMORA_BUILD = str(Path(sys.executable).parent / "remora-build")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint", "llama", dtype="bfloat16")


def tree(directory: Path) -> dict[str, bytes]:
    files = (p for p in directory.rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}


@pytest.mark.parametrize("block", [None, 32])
def test_the_same_checkpoint_gives_the_same_bytes(checkpoint, tmp_path, block):
    options = ExportOptions(int4_block=block)
    first = export_checkpoint(checkpoint, tmp_path / "a", options)
    second = export_checkpoint(checkpoint, tmp_path / "b", options)
    assert first.digest == second.digest
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_every_file_is_listed_with_its_digest(checkpoint, tmp_path):
    export_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions())
    bundle = load_bundle(tmp_path / "bundle")
    verify_files(tmp_path / "bundle", bundle.files)
    assert {f.path for f in bundle.files} | {BUNDLE_JSON} == set(tree(tmp_path / "bundle"))


def test_tokenizer_template_and_generation_config_are_carried_verbatim(checkpoint, tmp_path):
    (checkpoint / "special_tokens_map.json").write_text("{}")
    templates = checkpoint / "additional_chat_templates"
    templates.mkdir()
    (templates / "tools.jinja").write_text("{{ tools }}")
    export_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions(golden=False))
    bundle = tmp_path / "bundle"
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
    ):
        assert (bundle / "tokenizer" / name).read_bytes() == (checkpoint / name).read_bytes()
    generation = "generation_config.json"
    assert (bundle / generation).read_bytes() == (checkpoint / generation).read_bytes()


def test_special_tokens_come_from_generation_config_then_config(checkpoint, tmp_path):
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, 5], "pad_token_id": -1}))
    bundle = export_checkpoint(checkpoint, tmp_path / "a", ExportOptions(golden=False))
    assert (bundle.eos_token_ids, bundle.bos_token_id, bundle.pad_token_id) == ((2, 5, 1), 0, 1)
    path.unlink()
    bundle = export_checkpoint(checkpoint, tmp_path / "b", ExportOptions(golden=False))
    assert bundle.eos_token_ids == (1, 2)


def test_precisions_and_sharding_share_the_base_digest_and_weights_do_not(tmp_path):
    def base(name: str, options: ExportOptions, **settings) -> str:
        checkpoint = make_checkpoint(tmp_path / name, "llama", **settings)
        return export_checkpoint(checkpoint, tmp_path / f"{name}-out", options).base_digest

    plain = base("plain", ExportOptions(golden=False))
    assert base("other-precision", ExportOptions(dtype="float32", int4_block=32)) == plain
    assert base("sharded", ExportOptions(golden=False), shards=3) == plain
    assert base("other-weights", ExportOptions(golden=False), seed=1) != plain
    assert base("other-theta", ExportOptions(golden=False), rms_norm_eps=1e-6) != plain


def test_the_context_is_bounded_by_the_checkpoint(checkpoint, tmp_path):
    options = ExportOptions(golden=False)
    assert export_checkpoint(checkpoint, tmp_path / "a", options).graph.context == 512
    edit_config(checkpoint, max_position_embeddings=131072)
    assert export_checkpoint(checkpoint, tmp_path / "b", options).graph.context == 4096
    with pytest.raises(RequestInvalid, match="131072"):
        chosen = ExportOptions(max_context=131073)
        export_checkpoint(checkpoint, tmp_path / "c", chosen)


def test_a_block_that_does_not_divide_a_projection_names_it_and_the_way_out(checkpoint, tmp_path):
    with pytest.raises(Unsupported, match=r"q projection; use --int4-block 32"):
        export_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions(int4_block=128))
    narrow = make_checkpoint(tmp_path / "narrow", "qwen3", hidden=40)
    with pytest.raises(Unsupported, match=r"q projection; use --quant int8$"):
        export_checkpoint(narrow, tmp_path / "bundle", ExportOptions(quant="int4"))


@pytest.mark.parametrize(
    ("content", "error"), [(None, Unsupported), ("{}", CheckpointInvalid), ("[", CheckpointInvalid)]
)
def test_a_missing_or_damaged_tokenizer_is_found_before_the_work(
    checkpoint, tmp_path, content, error
):
    path = checkpoint / "tokenizer.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(error, match=r"tokenizer\.json"):
        export_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions())


def test_a_tokenizer_of_another_model_is_refused(checkpoint, tmp_path):
    path = checkpoint / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["vocab"]["another"] = 329
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointInvalid, match="329"):
        export_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions())


def test_added_tokens_that_the_model_lacks_are_noted(checkpoint, tmp_path):
    """google/gemma-3-1b-it: 262,144 tokens, and <image_soft_token> is number 262144."""
    path = str(checkpoint / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    added = tokenizer.add_tokens([f"<extra{i}>" for i in range(12)])
    assert added == 12
    tokenizer.save(path)
    bundle = export_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions())
    assert "<extra7>, 4 more: prompts" in bundle.notes["tokens_beyond"]


def test_special_tokens_outside_the_vocabulary_are_refused(checkpoint, tmp_path):
    edit_config(checkpoint, eos_token_id=99999)
    with pytest.raises(CheckpointInvalid, match=r"config\.json: eos_token_id is 99999"):
        export_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions())


def test_an_existing_bundle_is_replaced_only_when_asked_and_complete(checkpoint, tmp_path):
    out = tmp_path / "bundle"
    options = ExportOptions(golden=False)
    export_checkpoint(checkpoint, out, options)
    before = tree(out)
    with pytest.raises(Conflict, match="--force"):
        export_checkpoint(checkpoint, out, options)
    (checkpoint / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointInvalid):
        export_checkpoint(checkpoint, out, options, replace=True)
    assert tree(out) == before
    make_checkpoint(checkpoint, "llama", seed=9)
    export_checkpoint(checkpoint, out, options, replace=True)
    assert tree(out) != before
    verify_files(out, load_bundle(out).files)


def test_a_directory_that_is_no_bundle_is_never_replaced(checkpoint, tmp_path):
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.tex").write_text("years")
    with pytest.raises(Conflict, match=r"bundle\.json"):
        export_checkpoint(checkpoint, out, ExportOptions(), replace=True)
    assert (out / "thesis.tex").read_text() == "years"


def test_a_full_disk_is_said_and_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    class FullDisk(exporter.DataFile):
        def _write(self, raw):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(exporter, "DataFile", FullDisk)
    out = tmp_path / "out" / "bundle"
    with pytest.raises(Exhausted, match="no space left"):
        export_checkpoint(checkpoint, out, ExportOptions())
    assert list(out.parent.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from remora_build.export import exporter
from remora_build.export.options import ExportOptions

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

setattr(exporter, sys.argv[3], die)
exporter.export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), ExportOptions())
"""


@pytest.mark.parametrize("step", ["check_graph", "copy_tokenizer", "_write_golden", "_document"])
def test_a_killed_export_leaves_nothing_that_looks_like_a_bundle(checkpoint, tmp_path, step):
    out = tmp_path / "out" / "bundle"
    command = [sys.executable, "-c", KILLED, str(checkpoint), str(out), step]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not out.exists()
    assert not list(tmp_path.rglob(BUNDLE_JSON))


def test_the_command_reports_as_json_and_for_people(checkpoint, tmp_path):
    runner = CliRunner()
    command = ["export", str(checkpoint), str(tmp_path / "a"), "--int4-block", "32"]
    done = runner.invoke(build_app(), [*command, "--json"], catch_exceptions=False)
    summary = json.loads(done.stdout)
    assert summary["digest"] == load_bundle(tmp_path / "a").digest
    assert summary["golden"] is True
    command[2] = str(tmp_path / "b")
    done = runner.invoke(build_app(), [*command, "--name", "demo"], catch_exceptions=False)
    assert "demo, int4 in blocks of 32, float16, context 512" in done.stdout
    assert load_bundle(tmp_path / "b").source.name == "demo"


@pytest.mark.parametrize(
    "flags",
    [
        ["--int4-block", "64"],
        ["--dtype", "bfloat16"],
        ["--max-context", "0"],
        ["--max-bank-rank", "-1"],
        ["--dialect", "newest"],
        ["--golden", "x", "--no-golden"],
        ["--unknown"],
    ],
)
def test_wrong_usage_exits_with_two(checkpoint, tmp_path, flags):
    out = tmp_path / "bundle"
    done = CliRunner().invoke(build_app(), ["export", str(checkpoint), str(out), *flags])
    assert done.exit_code == 2
    assert not out.exists()


def test_a_refusal_is_one_line_on_stderr_and_exit_one(checkpoint, tmp_path):
    command = [REMORA_BUILD, "export", str(tmp_path), str(tmp_path / "bundle")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert "config.json" in done.stderr


def test_a_checkpoint_in_a_hugging_face_cache_is_called_by_its_repository(checkpoint, tmp_path):
    """Its files are links into a store of blobs; the bundle holds the files themselves."""
    cache = tmp_path / "hub" / "models--Some-Org--Tiny-1B"
    snapshot = cache / "snapshots" / "0123abcd"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in checkpoint.iterdir():
        path.rename(cache / "blobs" / f"sha-{path.name}")
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", f"sha-{path.name}"))
    bundle = export_checkpoint(snapshot, tmp_path / "bundle", ExportOptions())
    assert bundle.source.name == "Some-Org/Tiny-1B"
    assert not any(p.is_symlink() for p in (tmp_path / "bundle").rglob("*"))


def test_a_name_that_no_document_can_hold_is_refused(checkpoint, tmp_path):
    with pytest.raises(RequestInvalid, match="--name"):
        export_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions(), name="x\udcff")


def test_nothing_is_reported_to_the_makers_of_the_runtime(checkpoint, tmp_path):
    """ONNX Runtime leaves its identifier in ~/.cache when it may report."""
    silencing = ("CI", "TF_BUILD", "GITHUB_ACTIONS", "ORT_DISABLE_TELEMETRY")
    environment = {k: v for k, v in os.environ.items() if k not in silencing}
    environment |= {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home/.cache")}
    (tmp_path / "home").mkdir()
    arguments = [REMORA_BUILD, "export", str(checkpoint), str(tmp_path / "bundle"), "--json"]
    subprocess.run(arguments, env=environment, check=True, capture_output=True)
    assert not list((tmp_path / "home").rglob("*onnxruntime*"))


TERMINATED = """
import os, signal, sys
from remora_build import cli
from remora_build.export import exporter

def copy_tokenizer(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)

exporter.copy_tokenizer = copy_tokenizer
sys.argv = ["remora-build", "export", *sys.argv[1:]]
cli.main()
"""


def test_a_terminated_export_leaves_nothing_behind(checkpoint, tmp_path):
    command = [sys.executable, "-c", TERMINATED, str(checkpoint), str(tmp_path / "bundle")]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in ended.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint"}
