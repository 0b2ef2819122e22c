"""The real jtop service of jetson-stats, reading an emulated board."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.jtop_board import FAKE_SYS, SOCKET

ROOT = Path(__file__).parents[3]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("jtop") is None, reason="pip install jetson-stats"),
    pytest.mark.skipif(os.geteuid() != 0, reason="the jtop service needs root"),
    pytest.mark.skipif(
        FAKE_SYS.exists() or SOCKET.exists(), reason="a jtop service or another test is running"
    ),
]


@pytest.fixture
def service():
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.jtop_board", "serve"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        while (line := process.stdout.readline()) != b"ready\n":
            assert line, "the service ended before it was ready"
        yield process
    finally:
        process.stdin.close()
        process.wait(20)
        process.stdout.close()
        shutil.rmtree(FAKE_SYS, ignore_errors=True)
        SOCKET.unlink(missing_ok=True)


def test_an_emulated_board_is_read_through_the_real_service(service):
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.jtop_board", "read"],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["gpu_load.gpu"] == 0.43
    assert found["gpu_frequency_hz.gpu"] == 918_000_000
    assert found["power_watts"] == pytest.approx(6.2)
    assert found["rail_power_watts.VDD_CPU_GPU_CV"] == pytest.approx(1.5)
