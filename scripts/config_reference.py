"""Writes the configuration reference in docs/agent.md from the dataclasses of remora_agent.config.

`--check` exits 1 when the page has drifted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import typing
from pathlib import Path

from remora_agent.config import AgentConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "agent.md"
BEGIN, END = "<!-- config reference: begin -->", "<!-- config reference: end -->"


def reference(cls: type = AgentConfig, section: str = "") -> str:
    """A Markdown table for each section, top level first."""
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)
    nested = [f for f in fields if dataclasses.is_dataclass(hints[f.name])]
    rows = [_row(f, hints[f.name]) for f in fields if f not in nested]
    title = f"### `[{section}]`" if section else "### Top level"
    table = "\n".join(["| key | type | default | |", "|---|---|---|---|", *rows])
    parts = [f"{title}\n\n{table}"]
    parts += [reference(hints[f.name], f.name) for f in nested]
    return "\n\n".join(parts)


def page_with(text: str, generated: str) -> str:
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{generated}\n\n{END}{after}"


def _row(field: dataclasses.Field[object], kind: object) -> str:
    return f"| `{field.name}` | {_type(kind)} | {_default(field)} | {field.metadata['help']} |"


def _type(kind: object) -> str:
    words = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"table of {_type(arguments[1])}"
    kinds = [k for k in arguments if k is not type(None)]
    return _type(kinds[0]) if kinds else words[typing.cast(type, kind)]


def _default(field: dataclasses.Field[object]) -> str:
    if field.default is dataclasses.MISSING:
        required = field.default_factory is dataclasses.MISSING
        return "**required**" if required else "empty"
    if field.default is None:
        return "absent"
    return f"`{json.dumps(field.default)}`"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    text = PAGE.read_text()
    fresh = page_with(text, reference())
    if check and fresh != text:
        sys.exit("docs/agent.md has drifted: run python scripts/config_reference.py")
    PAGE.write_text(fresh)


if __name__ == "__main__":
    main()
