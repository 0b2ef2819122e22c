"""YAML from outside costs bounded time and memory and becomes nothing but plain data."""

from __future__ import annotations

import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from remora_contract.errors import DocumentInvalid
from remora_contract.yaml_text import MAX_BYTES, load_yaml

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False)
    | st.text("abc: -é☂#'\"\n01", max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text("abcé", max_size=6), inner, max_size=4)
    ),
    max_leaves=20,
)


def load(text: str) -> object:
    return load_yaml(text.encode(), "f.yaml")


@given(PLAIN)
def test_it_reads_what_yaml_writes(data):
    assert load(yaml.safe_dump(data, allow_unicode=True)) == data


def test_a_date_stays_text_and_an_alias_is_what_it_stands_for():
    assert load("on: &a [2020-01-01, 0x10]\nagain: *a") == {
        True: ["2020-01-01", 16],
        "again": ["2020-01-01", 16],
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("!!python/object/apply:os.system ['true']", "tags"),
        ("a: !!str 5", "tags"),
        ("a: !secret x", "tags"),
        ("a: 1\nb: {c: 1,\n c: 2}", "line 3: key 'c' is there twice"),
        ("- &a [*a]", "stands for nothing"),
        ("- *nobody", "stands for nothing"),
        ("a: {<<: {b: 1}}", "merge keys"),
        ("a\n---\nb", "more than one document"),
        ("? [1, 2]\n: 3", "key must be text"),
        ("[" * 5000, "nested deeper than 32"),
        ("{a: " * 5000, "nested deeper than 32"),
        ("a: " + "9" * 5000, "is no number"),
        ("a: b: c", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_what_is_not_plain_data_is_refused_with_file_and_place(text, said):
    with pytest.raises(DocumentInvalid, match=said) as caught:
        load(text)
    assert str(caught.value).startswith("f.yaml: ")


def test_bytes_that_are_too_many_or_no_text_are_refused():
    with pytest.raises(DocumentInvalid, match="larger than 256 KiB"):
        load_yaml(b" " * (MAX_BYTES + 1), "f")
    with pytest.raises(DocumentInvalid, match="UTF-8"):
        load_yaml(b"a: \xff", "f")


def test_aliases_of_aliases_do_not_multiply():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    began = time.process_time()
    with pytest.raises(DocumentInvalid, match="aliases written out"):
        load("\n".join(lines))
    assert time.process_time() - began < 5
