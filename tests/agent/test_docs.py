"""The pages about the agent say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from remora_agent.telemetry.serving import COUNTERS
from scripts.config_reference import PAGE, page_with, reference

ROOT = Path(__file__).parents[2]


def test_the_configuration_reference_has_not_drifted():
    text = PAGE.read_text()
    assert page_with(text, reference()) == text, "run python scripts/config_reference.py"


def test_every_setting_has_help():
    for line in reference().splitlines():
        if line.startswith("| `"):
            assert line.rstrip("| ").split("|")[-1].strip(), line


def test_every_metric_of_the_sources_is_documented():
    page = (ROOT / "docs" / "telemetry.md").read_text()
    names = set(COUNTERS.values())
    for path in (ROOT / "agent" / "remora_agent" / "telemetry").glob("*.py"):
        names |= set(re.findall(r'Reading\(\s*"([a-z0-9_]+)"', path.read_text()))
    assert len(names) > 25
    assert {n for n in names if f"`{n}`" not in page} == set()
