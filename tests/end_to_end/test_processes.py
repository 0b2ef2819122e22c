"""The demo's processes end with it, whatever moment Ctrl-C comes at."""

from __future__ import annotations

import signal
import subprocess
import time

import psutil
import pytest

from examples.demo.processes import Workshop

_SLEEPER = ("python", "-c", "import time; time.sleep(600)")
_started: list[int] = []


class _StruckAtOnce(subprocess.Popen):
    """Ctrl-C comes when the process is there and nobody knows it yet."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        _started.append(self.pid)
        signal.raise_signal(signal.SIGINT)


@pytest.fixture
def struck(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    _started.clear()
    monkeypatch.setattr(subprocess, "Popen", _StruckAtOnce)
    yield _started
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "begin", [lambda s: s.start("sleeper", *_SLEEPER), lambda s: s.run(*_SLEEPER)]
)
def test_ctrl_c_at_the_moment_of_a_start_leaves_nothing_behind(tmp_path, struck, begin):
    with pytest.raises(KeyboardInterrupt), Workshop(tmp_path) as shop:
        begin(shop)
    assert len(struck) == 1
    assert not psutil.pid_exists(struck[0])


def test_a_command_that_takes_too_long_is_ended_on_the_way_out(tmp_path):
    begun = time.monotonic()
    with pytest.raises(Exception, match="did not end within 1 s"), Workshop(tmp_path) as shop:
        shop.run(*_SLEEPER, timeout_s=1)
    assert time.monotonic() - begun < 60
    assert not [p for p in psutil.process_iter() if _in(p, tmp_path)]


def _in(process, folder):
    try:
        return process.cwd() == str(folder)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
