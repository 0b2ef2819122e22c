"""Documents are honoured or refused, key by key."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_contract.errors import DocumentInvalid
from remora_contract.strict import loads, parse, plain


@dataclass(frozen=True)
class Inner:
    n: int
    ratio: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    mode: Literal["a", "b"]
    inner: Inner
    many: tuple[Inner, ...] = ()
    table: dict[str, int] | None = None


GOOD = {"name": "x", "mode": "a", "inner": {"n": 3}}


def test_a_document_round_trips():
    document = Outer("x", "b", Inner(1, 2.0), (Inner(2),), {"k": 4})
    assert parse(Outer, plain(document), "t") == document


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"extra": 1}, "extra"),
        ({"name": 3}, "name"),
        ({"mode": "c"}, "mode"),
        ({"inner": {"n": 3, "ratioo": 1}}, "inner.ratioo"),
        ({"inner": {"n": True}}, "inner.n"),
        ({"inner": {}}, "inner.n"),
        ({"many": [{"n": 1}, {"n": "2"}]}, "many[1].n"),
        ({"table": {"k": "v"}}, "table.k"),
    ],
)
def test_a_wrong_key_is_named_with_its_file(change, named):
    with pytest.raises(DocumentInvalid) as caught:
        parse(Outer, GOOD | change, "some/file.json")
    assert named in str(caught.value)
    assert "some/file.json" in str(caught.value)


def test_a_whole_number_serves_as_a_float_but_not_the_other_way():
    assert parse(Inner, {"n": 1, "ratio": 2}, "t").ratio == 2.0
    with pytest.raises(DocumentInvalid, match="n must be a whole number"):
        parse(Inner, {"n": 1.0}, "t")


def test_what_is_not_json_is_refused():
    with pytest.raises(DocumentInvalid, match="not valid JSON"):
        loads(Inner, b"{", "t")
    with pytest.raises(DocumentInvalid):
        loads(Inner, "[" * 100_000, "t")


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
)


@given(_json)
def test_any_json_is_parsed_or_refused_and_nothing_else(data):
    try:
        document = parse(Outer, data, "t")
    except DocumentInvalid:
        return
    assert parse(Outer, plain(document), "t") == document


@dataclass(frozen=True)
class Loose:
    notes: dict[str, Any]
    name: str = ""
    ratio: float = 0.0


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "1" + "0" * 400])
def test_a_number_that_is_not_finite_is_refused_where_it_stands(number):
    with pytest.raises(DocumentInvalid, match=r"f\.json: ratio"):
        loads(Loose, f'{{"notes": {{}}, "ratio": {number}}}', "f.json")


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_data_without_a_schema_is_finite_too(number):
    with pytest.raises(DocumentInvalid, match=r"notes\.a\[1\]"):
        loads(Loose, f'{{"notes": {{"a": [1, {number}]}}}}', "f.json")


@pytest.mark.parametrize(
    "text",
    [
        '{"notes": {}, "name": "\\ud800"}',
        '{"notes": {"a": "x\\udfff"}}',
        '{"notes": {"\\ud800": 1}}',
    ],
)
def test_text_that_utf8_cannot_hold_is_refused(text):
    with pytest.raises(DocumentInvalid, match=r"f\.json: n"):
        loads(Loose, text, "f.json")


def test_data_without_a_schema_does_not_nest_without_end():
    with pytest.raises(DocumentInvalid, match="nested too deeply"):
        loads(Loose, '{"notes": {"a": ' + "[" * 600 + "]" * 600 + "}}", "f.json")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
)


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), json_values))
def test_data_without_a_schema_is_kept_as_it_is(notes):
    assert parse(Loose, {"notes": notes}, "t").notes == notes
