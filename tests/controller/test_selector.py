"""Label selectors."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_contract.errors import RequestInvalid
from remora_controller.selector import RESERVED, check_label, parse_selector

ORIN = {"site": "berlin", "gpu": "orin"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        ("site=berlin", True),
        ("site==berlin", True),
        ("site=paris", False),
        ("site!=paris", True),
        ("tier!=test", True),
        ("gpu in (orin,thor)", True),
        ("gpu in(thor)", False),
        ("gpu notin (orin)", False),
        ("tier notin (test, dev)", True),
        ("gpu", True),
        ("legacy", False),
        ("!legacy", True),
        ("! gpu", False),
        ("site=berlin,tier!=test,gpu in (orin,thor),!legacy", True),
        ("site=berlin, gpu = thor", False),
        ("id=device-1", True),
        ("id in (device-2)", False),
        ("site=paris or gpu=orin", True),
        ("site=paris or gpu=thor", False),
        ("site=berlin and gpu=thor or gpu=orin", True),
        ("site=paris and (gpu=thor or gpu=orin)", False),
        ("site=berlin,(gpu=thor or gpu in (orin,nano))", True),
        ("not site=berlin", False),
        ("not (site=paris or gpu=thor)", True),
        ("not site=paris and not !gpu", True),
        ("not not gpu", True),
        ("not=1", False),
        ("not in (a,b)", False),
        ("!and and !or", True),
        ("((site=berlin)and(gpu))or(legacy)", True),
        ("site!=paris or !gpu", True),
    ],
)
def test_a_selector_matches_as_documented(text, expected):
    assert parse_selector(text).matches("device-1", ORIN) is expected


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("site=berlin,", "''"),
        ("gpu in (orin", "not closed"),
        ("gpu in orin)", "unbalanced"),
        ("gpu in ((orin))", "unbalanced"),
        ("a b", "'a b'"),
        ("=x", "'=x'"),
        ("site=ber lin", "'ber lin'"),
        ("site=a=b", "'a=b'"),
        ("x" * 3000, "2048"),
        ("(site=berlin", "not closed"),
        ("(site=berlin) gpu", "cannot read 'gpu'"),
        ("site=berlin or ", "cannot read ''"),
        ("and site=berlin", "'and site=berlin'"),
        ("()", "''"),
        ("(" * 40 + "a" + ")" * 40, "nested deeper"),
        ("not " * 40 + "a", "nested deeper"),
        ("group", "group=NAME"),
        ("!group", "group=NAME"),
    ],
)
def test_a_bad_selector_is_refused_naming_the_place(text, named):
    with pytest.raises(RequestInvalid) as e:
        parse_selector(text)
    assert named in str(e.value)


LABEL = st.from_regex(r"[a-z][a-z0-9._/-]{0,10}", fullmatch=True).filter(
    lambda k: k not in RESERVED
)
LABELS = st.dictionaries(LABEL, st.from_regex(r"[a-z0-9._/:@+-]{0,10}", fullmatch=True), max_size=6)


@given(LABELS)
def test_whatever_may_be_a_label_can_be_selected_exactly(labels):
    for key, value in labels.items():
        check_label(key, value)
    text = ",".join(f"{k}={v}" for k, v in labels.items())
    assert parse_selector(text).matches("d", labels)
    for key in labels:
        without = {k: v for k, v in labels.items() if k != key}
        assert not parse_selector(text).matches("d", without)
        assert parse_selector(f"!{key}").matches("d", without)


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused(text):
    with contextlib.suppress(RequestInvalid):
        parse_selector(text).matches("d", ORIN)


@pytest.mark.parametrize(("key", "value"), [("id", "x"), ("", "x"), ("a b", "x"), ("a", "x,y")])
def test_a_label_that_no_selector_could_name_is_refused(key, value):
    with pytest.raises(RequestInvalid):
        check_label(key, value)
