"""benchmarks/gpu.sh on the emulators: what a person with a GPU runs, and the report it leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FIGURES = (
    "decode, batch 1",
    "decode, batch 8",
    "adapter of rank 16",
    "swap of resident adapters",
    "swap from host to bank",
    "step, the host's part",
    "a prompt beside decode steps",
    "energy per token",
    "against transformers + peft",
    "layers after fusion",
)


def run(report: Path, **more: str) -> subprocess.CompletedProcess[str]:
    settings = {"REMORA_GPU_EMULATED": "1", "PYTHON": sys.executable, "REMORA_GPU_STEPS": "20"}
    return subprocess.run(
        ["sh", str(ROOT / "benchmarks" / "gpu.sh"), str(report)],
        env=os.environ | settings | more,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_one_command_runs_every_part_and_ends_with_a_line_for_each(tmp_path: Path):
    done = run(tmp_path / "report.txt")
    report = (tmp_path / "report.txt").read_text()
    assert done.returncode == 0, report[-3000:]
    assert "EMULATED" in report
    summary = report.partition("== Summary")[2]
    assert "tensorrt: conformance: passed" in summary
    assert "tensorrt: tests on the GPU: passed" in summary
    assert "tensorrt: against transformers and PEFT: passed" in summary
    assert [name for name in FIGURES if f"| {name} |" not in summary] == []
    assert "test_a_score_gives_the_logits_after_every_token[gpu-tensorrt-int4] PASSED" in report


@pytest.mark.slow
def test_a_part_that_fails_keeps_no_other_from_running(tmp_path: Path):
    done = run(tmp_path / "report.txt", REMORA_GPU_STEPS="none")
    summary = (tmp_path / "report.txt").read_text().partition("== Summary")[2]
    assert done.returncode == 1
    assert "tensorrt: tests on the GPU: FAILED" in summary
    assert "tensorrt: conformance: passed" in summary
    assert "tensorrt: figures: passed" in summary


def test_without_a_gpu_nothing_runs_and_the_report_says_what_is_missing(tmp_path: Path):
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU")
    done = run(tmp_path / "report.txt", REMORA_GPU_EMULATED="0")
    assert done.returncode == 2
    assert "nothing was run" in done.stdout
