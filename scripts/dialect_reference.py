"""Writes the tables in docs/dialects.md from remora_contract: dialects, and trt103's table of what
TensorRT 10.3 takes.

`--check` exits 1 when the page has drifted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from remora_contract.dialects import JETPACKS, SUPPORT, dialects_of_jetpack
from remora_contract.trt103 import OPERATORS, Rule

PAGE = Path(__file__).resolve().parents[1] / "docs" / "dialects.md"
TABLES = ("backends", "jetpacks", "operators")


def page_with_tables(text: str) -> str:
    """`text` with every table between its markers written again."""
    made = {"backends": _backends(), "jetpacks": _jetpacks(), "operators": _operators()}
    for name in TABLES:
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n\n{made[name]}\n\n{end}{after}"
    return text


def _backends() -> str:
    rows = [f"| `{s.backend}` | {s.version} | {', '.join(s.dialects)} | {s.why} |" for s in SUPPORT]
    return "\n".join(
        ["| backend | from version | takes, best first | |", "|---|---|---|---|", *rows]
    )


def _jetpacks() -> str:
    rows = [
        f"| {j.version} | {j.boards} | {j.tensorrt} | {j.cuda} | {j.python} "
        f"| {dialects_of_jetpack(j.version)[0]} |"
        for j in JETPACKS
    ]
    head = "| JetPack | boards | TensorRT | CUDA | Python | `--dialect` |"
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


def _operators() -> str:
    rows = [
        f"| {op} | {_types(rule)} | {_limits(rule)} |" for op, rule in sorted(OPERATORS.items())
    ]
    return "\n".join(["| operator | types | only if |", "|---|---|---|", *rows])


def _types(rule: Rule) -> str:
    return ", ".join(sorted(rule.types))


def _limits(rule: Rule) -> str:
    limits = [f"input {i} is an initializer" for i in rule.constant]
    if rule.inputs is not None:
        limits.append(f"at most {rule.inputs} inputs")
    if rule.outputs is not None:
        limits.append(f"at most {rule.outputs} output")
    limits += [f"{k} is {' or '.join(map(str, v))}" for k, v in rule.attributes.items()]
    if rule.note:
        limits.append(rule.note)
    return "; ".join(limits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    text = PAGE.read_text()
    fresh = page_with_tables(text)
    if check and fresh != text:
        sys.exit("docs/dialects.md has drifted: run python scripts/dialect_reference.py")
    PAGE.write_text(fresh)


if __name__ == "__main__":
    main()
