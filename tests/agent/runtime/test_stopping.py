"""Stop strings across token borders, and the order of reasons to stop."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_agent.runtime.api import FinishReason, StoppingParams
from remora_agent.runtime.stopping import StopStrings, ending_tokens, stop_reason

STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


def run(stops, pieces):
    """The text that came out, and the match."""
    strings, out = StopStrings(stops), ""
    for piece in pieces:
        passed = strings.push(piece)
        out += passed.text
        if passed.match is not None:
            return out, passed.match
    return out + strings.flush(), None


def test_text_is_held_only_while_it_may_begin_a_stop_string():
    strings = StopStrings(["\nUser:"])
    assert strings.push("Hello\nUs").text == "Hello"
    assert strings.holds
    assert strings.push("ually").text == "\nUsually"
    assert not strings.holds


def test_a_stop_string_is_found_across_pieces():
    assert run(["END"], ["ab", "cE", "N", "D", "never"]) == ("abc", "END")


def test_the_string_complete_first_wins_then_the_longest():
    assert run(["abcd", "bc"], ["abcd"]) == ("a", "bc")
    assert run(["c", "bc"], ["abcd"]) == ("a", "bc")


@given(STOPS, st.lists(st.text("abc", max_size=4), max_size=10))
def test_how_the_text_is_cut_changes_nothing(stops, pieces):
    whole = "".join(pieces)
    assert run(stops, pieces) == run(stops, [whole]) == run(stops, list(whole))


@given(STOPS, st.lists(st.text("abc", max_size=4), max_size=10))
def test_what_comes_out_holds_no_stop_string_and_loses_nothing(stops, pieces):
    whole = "".join(pieces)
    out, match = run(stops, pieces)
    assert not any(stop in out for stop in stops)
    assert whole.startswith(out + (match or "")) if match else out == whole


@pytest.mark.parametrize(
    ("token", "produced", "changes", "reason"),
    [
        (5, 1, {}, None),
        (9, 1, {}, FinishReason.STOP),
        (9, 1, {"ignore_eos": True}, None),
        (9, 1, {"ignore_eos": True, "stop_token_ids": (9,)}, FinishReason.STOP),
        (7, 1, {"stop_token_ids": (7,)}, FinishReason.STOP),
        (5, 4, {}, FinishReason.LENGTH),
        (9, 4, {}, FinishReason.STOP),
    ],
)
def test_stop_tokens_and_length(token, produced, changes, reason):
    assert (
        stop_reason(token, produced, 4, ending_tokens(StoppingParams(4, **changes), {9})) is reason
    )
