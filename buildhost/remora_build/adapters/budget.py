"""An end to the matching of an adapter's regular expressions, which come from outside: one like
`((a+)+)+!` takes longer than anybody waits. Python cannot stop a match in a thread, so a process of
its own (`matcher`) does it. Owns the time and that process; knows no pattern.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from remora_build.adapters import matcher
from remora_contract.errors import AdapterInvalid

MATCHING_S = 20.0  # of the processor; 10,000 modules take less than one
How = Literal["match", "fullmatch"]  # functions of re
_PATTERNS = (
    "regular expressions (target_modules, exclude_modules, rank_pattern, alpha_pattern, "
    "layers_pattern)"
)


@dataclass(frozen=True)
class Match:
    index: int  # of the first pattern that matches
    idx: str | None  # its group of this name


@contextmanager
def matching(where: str) -> Iterator[None]:
    """All that `first_match` matches in this block takes at most MATCHING_S, or AdapterInvalid is
    raised. `where` is what the adapter is called."""
    matches = _Matches(where)
    before = _matches.set(matches)
    try:
        yield
    finally:
        _matches.reset(before)
        matches.close()


def first_match(how: How, patterns: Sequence[str], text: str) -> Match | None:
    """The first of the patterns that matches `text`. Raises AdapterInvalid for one that is no
    regular expression, if it is reached, and when the time of the block is over."""
    if not patterns:
        return None
    matches = _matches.get()
    if matches is not None:
        return matches.first(how, patterns, text)
    with matching("adapter config"):
        return first_match(how, patterns, text)


class _Matches:
    """The process, started with the first match, and the lists of patterns that it knows."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._process: subprocess.Popen[str] | None = None
        self._lists: dict[tuple[How, tuple[str, ...]], int] = {}
        self._since_s = time.thread_time()

    def first(self, how: How, patterns: Sequence[str], text: str) -> Match | None:
        if time.thread_time() - self._since_s > MATCHING_S:  # ours: the lists are long
            raise self._over()
        index, idx, *wrong = self._answer(how, tuple(patterns), text)
        if wrong:
            shown = patterns[index][:80]
            raise AdapterInvalid(f"adapter config: {shown!r} is no regular expression: {wrong[0]}")
        return None if index is None else Match(index, idx)

    def _answer(self, how: How, patterns: tuple[str, ...], text: str) -> list[Any]:
        process = self._process = self._process or _start()
        assert process.stdin is not None and process.stdout is not None  # both are pipes
        lines = []
        if (how, patterns) not in self._lists:
            self._lists[how, patterns] = len(self._lists)
            lines.append(json.dumps([how, patterns]))
        lines.append(json.dumps([self._lists[how, patterns], text]))
        try:
            process.stdin.write("\n".join(lines) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._ended(process.wait())
        found: list[Any] = json.loads(line)
        return found

    def _ended(self, status: int) -> AdapterInvalid:
        if status == -signal.SIGVTALRM:
            return self._over()
        return AdapterInvalid(
            f"{self._where}: the process that matches its {_PATTERNS} ended ({status}): write "
            "them shorter and without nesting"
        )

    def _over(self) -> AdapterInvalid:
        return AdapterInvalid(
            f"{self._where}: its {_PATTERNS} need more than {MATCHING_S:g} s to match modules: "
            "write them without a repetition inside a repetition"
        )

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with process:  # closes the pipes and waits
                pass


def _start() -> subprocess.Popen[str]:
    """Isolated: nothing of this process's environment, nor of installed packages."""
    command = [sys.executable, "-I", "-S", str(Path(matcher.__file__)), str(MATCHING_S)]
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nothing, text=True)


_matches: ContextVar[_Matches | None] = ContextVar("matches", default=None)
