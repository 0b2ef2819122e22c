"""Every benchmark starts: a published figure whose script does not run cannot be checked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LIBRARIES = {"alternate", "gpu_peers", "peft_adapter"}
PROGRAMS = sorted(p.stem for p in BENCHMARKS.glob("*.py") if p.stem not in LIBRARIES)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_benchmark_starts_and_explains_its_options(name, tmp_path):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--help"]
    # As a reader starts it: from anywhere, with no path set up for it.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path, env=env
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "usage:" in done.stdout
