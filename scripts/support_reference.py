"""Writes docs/support.md's tables from the code: architectures, PEFT fields, formats, bases.

    python -m scripts.support_reference [--check]

`--check` exits 1 when the page has drifted. Needs the development environment: the list of PEFT's
methods is the installed peft's, the variants are those of the tests.
"""

from __future__ import annotations

import argparse
import sys
import typing
from collections.abc import Callable, Iterable
from pathlib import Path

from remora_build.adapters.fields import FIELDS
from remora_build.adapters.formats.registry import SIGNS, SOURCE_FORMATS, TARGET_FORMATS
from remora_build.adapters.rules import Rule
from remora_build.families import FAMILIES
from remora_build.families.wrappers import WRAPPERS
from remora_build.merge.fields import FIELDS as MERGE_FIELDS
from remora_contract.decoder import RopeSpec
from scripts import support_evidence as evidence
from scripts.markdown import table

# Fields by which a quantizing tool says how, of the whole config and of one of its groups.
WHOLE = ("quant_algo", "format", "bits", "group_size", "sym", "zero_point", "weight_block_size")
OF_GROUP = ("type", "num_bits", "strategy", "group_size", "symmetric")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "support.md"


def page_with_tables(text: str) -> str:
    """`text` with every table between its markers written again."""
    for name, written in TABLES.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin not in text or end not in text:
            sys.exit(f"docs/support.md has no markers for its table {name!r}")
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n\n{written()}\n\n{end}{after}"
    return text


def _families() -> str:
    from tests.buildhost.family_forms import VARIANTS

    rows = []
    for family in FAMILIES.values():
        variants = [name for name, (kind, _) in VARIANTS.items() if kind == family.model_type]
        tested = ", ".join([family.model_type, *variants])
        rows.append((family.title, f"`{family.model_type}`", family.own, tested))
    return table(("models", "`model_type`", "its own", "forms held to transformers"), rows)


def _wrapped() -> str:
    rows = [
        (w.title, f"`{w.model_type}`", ", ".join(f"`{t}`" for t in dict.fromkeys(w.text.values())))
        for w in WRAPPERS.values()
    ]
    return table(("model", "`model_type`", "its text part is exported as"), rows)


def _ropes() -> str:
    scalings = typing.get_args(typing.get_type_hints(RopeSpec)["scaling"])
    rows = [(f"`{s}`", ", ".join(evidence.ROPE_FORMS[s])) for s in scalings]
    rows.append(("`dynamic`", "refused by name: its frequencies follow the length reached"))
    return table(("scaling", "forms held to transformers"), rows)


def _fields() -> str:
    rows = []
    for name, rule in FIELDS.items():
        carried, merged = _treated(rule), _treated(MERGE_FIELDS.get(name))
        row = (f"`{name}`", carried, "the same" if merged == carried else merged, _tests(name))
        rows.append(row)
    head = ("field", "`remora-build adapter`", "`remora-build merge`", "tests")
    return table(head, rows)


def _treated(rule: Rule | None) -> str:
    """The treatment and its sentence."""
    if rule is None:
        return "refused by name"
    return f"**{rule.treatment}**: {rule.text}"


def _tests(field: str) -> str:
    return _files(evidence.FIELDS.get(field, ()) or (evidence.FIELDS_TEST,))


def _methods() -> str:
    return ", ".join(f"`{name}`" for name in other_methods()) + "."


def other_methods() -> list[str]:
    """Every peft_type of the installed PEFT that is not LoRA."""
    import peft

    return sorted(kind.value for kind in peft.PeftType if kind.value != "LORA")


def _formats() -> str:
    rows = [
        (
            f"`{name}`",
            ", ".join(f"`{file}`" for file in SIGNS[name]),
            "yes",
            "yes" if name in TARGET_FORMATS else "no",
            _files(evidence.FORMATS[name]),
        )
        for name in SOURCE_FORMATS
    ]
    return table(("format", "recognised by", "read", "written", "tests"), rows)


def _bases() -> str:
    from tests.support.quantized import LAYOUTS

    rows = []
    for name, (_, config) in LAYOUTS.items():
        where = config.get("quantization", config)
        tool = where.get("quant_method", "modelopt")
        rows.append((f"`{name}`", f"`{tool}`", _scheme(where)))
    return table(("layout in the tests", "tool", "what its config says"), rows)


def _scheme(config: dict[str, object]) -> str:
    """The words by which the tool says how it quantized; llm-compressor keeps them in a group."""
    said = [f"{w} {config[w]}" for w in WHOLE if w in config]
    groups = config.get("config_groups")
    if isinstance(groups, dict):
        weights = groups["group_0"]["weights"]
        said += [f"{w} {weights[w]}" for w in OF_GROUP if w in weights]
        inputs = groups["group_0"]["input_activations"]
        said += ["static inputs"] if inputs and inputs["dynamic"] is False else []
    return ", ".join(said)


def _inserted() -> str:
    from tests.support.respell import REFERENCE_ONLY, RUNNABLE

    rows = [(f"`{n}`", "ONNX Runtime") for n in RUNNABLE]
    rows += [(f"`{n}`", "onnx.reference with stand-ins") for n in REFERENCE_ONLY]
    return table(("form of a projection", "held to the graph with the adapters stored, on"), rows)


def _files(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


TABLES: dict[str, Callable[[], str]] = {
    "families": _families,
    "wrapped": _wrapped,
    "ropes": _ropes,
    "fields": _fields,
    "methods": _methods,
    "formats": _formats,
    "bases": _bases,
    "inserted": _inserted,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    text = PAGE.read_text()
    fresh = page_with_tables(text)
    if check and fresh != text:
        sys.exit("docs/support.md has drifted: run python -m scripts.support_reference")
    if not check:
        PAGE.write_text(fresh)


if __name__ == "__main__":
    main()
