"""docs/first-fleet.md is typed as it stands, in order, into one shell in a fresh folder.

Its `sh` blocks run; every line of a `text` block must have come out of the block before it. Ports
are exchanged for free ones. The indented lines of its first section (clone, install) make the
environment that runs this test; here they are only held to the Makefile."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.stage import ROOT

PAGE = ROOT / "docs" / "first-fleet.md"
PORTS = ("7440", "7441", "7442", "7451", "7452", "7453")
_FENCED = re.compile(r"^```(sh|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INSTALL_TARGET = "install"


def test_the_page_installs_with_a_target_that_there_is():
    assert f"    make {_INSTALL_TARGET}\n" in PAGE.read_text()
    done = subprocess.run(
        ["make", "--dry-run", _INSTALL_TARGET], cwd=ROOT, capture_output=True, check=True
    )
    assert b"error" not in done.stderr


def test_every_command_of_the_page_is_in_a_block_that_is_run():
    prose = _FENCED.sub("", PAGE.read_text())
    indented = [line.strip() for line in prose.splitlines() if line.startswith("    ")]
    assert [line.split()[0] for line in indented] == ["git", "cd", "make", "."]


@pytest.mark.slow
def test_the_page_does_what_it_says(tmp_path):
    steps, said = _steps(PAGE.read_text())
    assert len(steps) > 8 and sum(map(len, said)) > 5
    script = tmp_path / "page.sh"
    free = _free_ports()
    script.write_text(_script(_with_ports(steps, free)))
    controller = f"127.0.0.1:{free[0]}"  # the credentials name the port that is usual
    outputs = _run(script, tmp_path, REMORA_CONTROLLER=controller)
    for number, (expected, output) in enumerate(zip(said, outputs, strict=True)):
        for line in expected:
            assert line in output.splitlines(), f"block {number + 1} said:\n{output}"
    assert not (tmp_path / "first-fleet").exists(), "it cleans up behind itself"


def _steps(text):
    """Commands of each `sh` block, and the lines that the `text` block behind it promises."""
    steps, said = [], []
    for kind, body in _FENCED.findall(text):
        if kind == "sh":
            steps.append(body)
            said.append([])
        else:
            said[-1] += body.splitlines()
    return steps, said


def _with_ports(steps, free):
    """745$n is a port whose last digit the shell fills in."""
    pairs = {**dict(zip(PORTS, map(str, free), strict=True)), "745$n": f"{str(free[3])[:-1]}$n"}
    pattern = re.compile("|".join(map(re.escape, sorted(pairs, key=len, reverse=True))))
    return [pattern.sub(lambda m: pairs[m.group()], step) for step in steps]


def _free_ports():
    """Three for the controller, and three for the agents that end in 1, 2 and 3."""
    for tens in range(2100, 3200):
        agents = [tens * 10 + n for n in (1, 2, 3)]
        controller = [tens * 10 + n for n in (4, 5, 6)]
        if all(map(_is_free, (*controller, *agents))):
            return [*controller, *agents]
    raise AssertionError("no free ports")


def _is_free(port):
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) != 0


_PATIENCE_S = 1500.0  # it trains a model, beside whatever else runs here
_MARK = "=== end of a block ==="


def _script(steps):
    blocks = (f"{step}\necho; echo {shlex.quote(_MARK)}\n" for step in steps)
    return "set -euo pipefail\n" + "".join(blocks)


def _run(script, folder, **environment):
    """What each block wrote, begun in what the page needs of a clone."""
    clone = folder / "remora"
    clone.mkdir()
    (clone / "examples").symlink_to(ROOT / "examples")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    log = folder / "page.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", str(script)],
            cwd=clone,
            # Training beside other work does not spin.
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **environment, "PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(_PATIENCE_S)
        finally:
            _end_group(process)
    text = log.read_text()
    assert status == 0, text[-6000:]
    return text.split(f"{_MARK}\n")[:-1]


def _end_group(process):
    """Nothing of the page outlives the test, whatever became of it."""
    with contextlib.suppress(ProcessLookupError):  # it has ended, and so have its children
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
