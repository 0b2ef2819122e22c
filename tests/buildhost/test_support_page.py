"""docs/support.md says what the code does, and every row's evidence exists and speaks of it."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import pytest

from remora_build.adapters import fields as carried
from remora_build.adapters.rules import Rules
from remora_build.families import FAMILIES
from remora_build.families.wrappers import WRAPPERS
from remora_build.merge import fields as merged
from remora_contract.decoder import RopeSpec
from remora_contract.errors import Unsupported
from scripts import support_evidence as evidence
from scripts.support_reference import PAGE, other_methods, page_with_tables
from tests.buildhost import family_forms, test_multimodal

TESTS = Path(__file__).resolve().parents[1]


def test_the_page_has_the_tables_of_the_code() -> None:
    text = PAGE.read_text()
    assert page_with_tables(text) == text, "run python -m scripts.support_reference"


def test_every_test_file_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`((?:buildhost|agent)/[\w/]+\.py)`", PAGE.read_text()))
    assert len(named) > 20
    assert [name for name in sorted(named) if not (TESTS / name).is_file()] == []


def test_the_evidence_of_a_field_speaks_of_it() -> None:
    honoured = {name for name, rule in carried.FIELDS.items() if rule.kind == "honoured"}
    assert honoured <= set(evidence.FIELDS) <= set(carried.FIELDS)
    for field, files in evidence.FIELDS.items():
        for file in files:
            told = re.search(rf'"{field}"|\b{field}=', (TESTS / file).read_text())
            assert told or file == evidence.FIELDS_TEST, f"{file} does not mention {field}"


def test_the_evidence_of_a_format_speaks_of_it() -> None:
    for name, files in evidence.FORMATS.items():
        assert all(name in (TESTS / file).read_text() for file in files)


def test_every_architecture_and_wrapper_has_a_form_that_is_run() -> None:
    assert {family for family, _ in family_forms.FAMILIES.values()} == set(FAMILIES)
    assert {outer for outer, _, _ in test_multimodal.MODELS.values()} == set(WRAPPERS)


def test_every_rope_scaling_has_a_form_that_is_run() -> None:
    scalings = typing.get_args(typing.get_type_hints(RopeSpec)["scaling"])
    assert set(evidence.ROPE_FORMS) == set(scalings)
    assert {f for forms in evidence.ROPE_FORMS.values() for f in forms} <= set(family_forms.FORMS)


@pytest.mark.parametrize("rules", [carried.CARRIED, merged.MERGED])
def test_every_other_method_of_peft_is_refused_by_its_name(rules: Rules) -> None:
    methods = other_methods()
    assert {"ADALORA", "LOHA", "LOKR", "IA3", "VERA", "PREFIX_TUNING"} <= set(methods)
    for method in methods:
        with pytest.raises(Unsupported, match=f"peft_type = '{method}'"):
            rules.check({"peft_type": method, "a_field_of_theirs": 1}, "adapter_config.json")
