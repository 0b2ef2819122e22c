"""docs/releases.md names every key of release.yaml, and its example is one."""

from __future__ import annotations

import textwrap
from dataclasses import fields
from pathlib import Path

import pytest

from remora_contract.release import Constraints, SamplingDefaults
from remora_controller.operator_cli.release_document import ReleaseFile, read_release_file

PAGE = (Path(__file__).parents[2] / "docs" / "releases.md").read_text()


@pytest.mark.parametrize("kind", [ReleaseFile, Constraints, SamplingDefaults])
def test_every_key_is_there(kind):
    assert [f.name for f in fields(kind) if f"`{f.name}`" not in PAGE] == []


def test_the_example_is_a_release():
    lines = PAGE.splitlines()
    start = lines.index("    name: assistant")
    end = lines.index("", start)
    example = textwrap.dedent("\n".join(lines[start:end]))
    release = read_release_file(example.encode(), "docs/releases.md")
    assert release.use_cases[0].name == "report" and release.constraints.sm == (87,)
