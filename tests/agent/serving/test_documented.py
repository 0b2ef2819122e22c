"""Each option of the commands is in its page."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from remora_agent.cli import build_app

DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.parametrize(("command", "page"), [("serve", "serving.md"), ("generate", "batch.md")])
def test_every_option_is_documented_and_has_help(command, page):
    text = (DOCS / page).read_text()
    group = typer.main.get_command(build_app())
    parameters = group.commands[command].params
    assert parameters
    for parameter in parameters:
        assert parameter.help, parameter.name
        for flag in parameter.opts:
            if flag.startswith("--"):
                assert flag in text, flag


def test_what_stands_in_brackets_is_shown(monkeypatch):
    """typer reads help as markup, in which they are styles."""
    monkeypatch.setenv("COLUMNS", "200")
    shown = CliRunner().invoke(build_app(), ["serve", "--help"])
    assert "(needs remora[otel])" in shown.stdout
