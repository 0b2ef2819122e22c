"""`remora-agent build` and `remora-build engine` as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from remora_agent.engine.cache import read_entry
from remora_agent.engine.trt.inspector import AT_LOAD
from remora_contract.bundle import verify_files
from remora_contract.engine import load_engine_document
from tests.agent.engine.portable import FLOAT16, QWEN3, random_bundle

needs_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx is not installed: pip install 'remora[tensorrt]'",
)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return random_bundle(tmp_path / "bundle", QWEN3, FLOAT16)


def run(command: str, *arguments: object, home: Path) -> subprocess.CompletedProcess[str]:
    """`command`: the module whose `main` is the command."""
    program = f"from {command}.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=170,
        env={**os.environ, "HOME": str(home)},
    )


@needs_rtx
def test_an_engine_for_other_gpus_is_built_and_can_be_taken_along(bundle: Path, tmp_path: Path):
    out = tmp_path / "engine"
    ended = run(
        "remora_build", "engine", bundle, "--sm", 86, "--sm", 89, "--rows", 2, "--out", out,
        "--json", home=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    made = json.loads(ended.stdout)
    assert made["processors"] == [86, 89]
    assert made["rows"] == 2
    assert made["memory"]["weights"] > 0
    assert made["layers"]["ATTENTION_INPUT"] == QWEN3.layers
    assert (made["layers_after_fusion"], made["layers_after_fusion_not_told"]) == ({}, AT_LOAD)
    entry = read_entry(out)
    verify_files(out, entry.manifest.files)
    assert entry.manifest.digest == made["digest"] == load_engine_document(out).digest


@needs_rtx
def test_the_table_for_people_names_layers_memory_and_time(bundle: Path, tmp_path: Path):
    options = ("--backend", "tensorrt_rtx", "--sm", 120)
    first = run("remora_agent", "build", bundle, *options, home=tmp_path)
    again = run("remora_agent", "build", bundle, *options, home=tmp_path)
    assert first.returncode == again.returncode == 0, first.stderr
    for words in ("for SM 120", "built in", "weights", "activations", "matrix_multiply", AT_LOAD):
        assert words in first.stdout
    assert "building" in first.stderr
    assert "from the cache" in again.stdout


def test_the_engine_of_this_processor_is_built_by_the_same_command(bundle: Path, tmp_path: Path):
    ended = run("remora_agent", "build", bundle, "--json", home=tmp_path)
    assert ended.returncode == 0, ended.stderr
    made = json.loads(ended.stdout)
    assert (made["backend"], made["processors"], made["layers"]) == ("onnxruntime", [], {})
    assert made["memory"]["weights"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--backend", "cuda"), "one of onnxruntime, tensorrt, tensorrt_rtx"),
        (("--sm", "86"), "for this machine's processor only"),
        (("--context", "4096"), "larger --max-context"),
        (("--out", "bundle"), "exists; name a new directory"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_written(
    bundle: Path, tmp_path: Path, options: tuple[str, ...], words: str
):
    given = [str(tmp_path / o) if o == "bundle" else o for o in options]
    ended = run("remora_agent", "build", bundle, *given, home=tmp_path)
    assert ended.returncode == 1
    assert words in ended.stderr
    assert not list((tmp_path / ".cache").glob("remora/engines/*/engine.json"))


@needs_rtx
@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
def test_serving_without_a_gpu_is_refused_at_once(bundle: Path, tmp_path: Path):
    ended = run("remora_agent", "serve", bundle, "--backend", "tensorrt_rtx", home=tmp_path)
    assert ended.returncode == 1
    assert "no NVIDIA GPU" in ended.stderr
