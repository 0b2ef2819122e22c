"""`python -m examples.demo` as a user runs it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from examples.demo.account import Account
from examples.demo.cast import BASE, Check
from examples.demo.processes import DemoFailed, Workshop, await_value
from examples.demo.story import Story
from examples.demo.world import VARIANTS, questions
from tests.end_to_end.stage import ENVIRONMENT, ROOT

pytestmark = pytest.mark.slow


@contextmanager
def demo(*arguments, **environment):
    """Its process, which is ended with all of its own if the test did not see to that."""
    # A shell's background job hands its children an ignored SIGINT.
    restored = ["env", "--default-signal=INT"]
    with subprocess.Popen(
        [*restored, sys.executable, "-m", "examples.demo", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def living_in(folder: Path):
    """Processes that work in the folder or below it."""
    return [process for process in psutil.process_iter() if _works_in(process, folder)]


def _works_in(process, folder):
    try:
        return Path(process.cwd()).is_relative_to(folder)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _command(process):
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # it has ended meanwhile
        return []


def test_training_makes_every_variant_answer_everything_in_full_and_in_int4(tmp_path):
    shop = Workshop(tmp_path, {**ENVIRONMENT, "OMP_WAIT_POLICY": "PASSIVE"})
    shop.run("python", "-m", "examples.demo.train", "out", timeout_s=900)
    lessons = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [lesson["variant"] for lesson in lessons] == list(VARIANTS)
    for lesson in lessons:
        for marks in lesson["grade"].values():
            assert marks["right"] == marks["asked"] == len(questions())
            assert marks["margin"] >= 1.0


def test_it_tells_the_whole_story_for_a_checkpoint_of_ones_own(artifacts, tmp_path):
    folder = tmp_path / "kept"
    with demo("--checkpoint", artifacts.cast.checkpoint, "--keep", folder) as process:
        output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output
    assert "It works" in output
    assert "0 failed" in output
    assert living_in(folder) == []


def test_ctrl_c_ends_every_process_and_removes_the_folder(artifacts, tmp_path):

    def agents():
        return [p for p in living_in(tmp_path) if "run" in _command(p)]

    with demo("--checkpoint", artifacts.cast.checkpoint, TMPDIR=str(tmp_path)) as process:
        await_value(lambda: len(agents()) == 3, "three agents", 600.0)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "interrupted" in output
    assert living_in(tmp_path) == []
    assert not list(tmp_path.glob("remora-demo-*"))


class _Doubtful:
    """Expects another base answer to one question than the model gives."""

    def check(self, variant, question, result):
        wrong = variant == BASE and "bees" in question
        return Check(f"{variant}: {question!r} should be otherwise" if wrong else None, 1)


def test_a_wrong_answer_ends_it_with_its_name(artifacts, tmp_path):
    cast = dataclasses.replace(artifacts.cast, precision="int4", oracle=_Doubtful())
    account = Account(Console(quiet=True))
    with (
        Workshop(tmp_path, dict(ENVIRONMENT)) as shop,
        pytest.raises(DemoFailed, match=r"edge-1: base: 'What do bees make\?' should be otherwise"),
    ):
        Story(shop, account, cast).tell()
    assert living_in(tmp_path) == []
