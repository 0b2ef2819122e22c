"""What docs/tensorrt-evidence.md points to exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "tensorrt-evidence.md"
_NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")
_STATES = ("executed", "emulated", "documentation only", "ready", "not there")


def _rows() -> list[list[str]]:
    """Cells of the tables under "Build" and "Run"."""
    parts = PAGE.read_text().split("\n## ")
    lines = [
        line
        for part in parts
        if part.startswith(("Build\n", "Run\n"))
        for line in part.splitlines()
        if line.startswith("| ") and not line.startswith("| what ")
    ]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_line_says_how_far_it_was_carried_out():
    rows = _rows()
    assert len(rows) > 25
    assert [row for row in rows if not row[1].startswith(_STATES)] == []


def test_what_ran_names_the_tests_that_show_it():
    assert [row[0] for row in _rows() if not row[1].startswith("not there") and not row[2]] == []


def test_every_named_test_exists():
    named = _NAMED.findall(PAGE.read_text())
    assert len(named) > 30
    missing = [
        f"{path}::{name}"
        for path, name in named
        if f"\ndef {name}(" not in (ROOT / path).read_text()
    ]
    assert missing == []
