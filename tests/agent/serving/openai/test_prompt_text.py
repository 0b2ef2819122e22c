"""Where each token of an echoed prompt begins, unknown words and added tokens included."""

from __future__ import annotations

import time

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from remora_agent.serving.openai.prompt_text import rooms

UNK, BOS, EOS = 0, 1, 2


def placed(tokens: list[tuple[int, bytes]], text: str) -> list[int]:
    """Byte at which each begins."""
    found = rooms([i for i, _ in tokens], [raw for _, raw in tokens], text.encode())
    return [sum(found[:i]) for i in range(len(found))]


@pytest.mark.parametrize(
    ("tokens", "text", "begins"),
    [
        ([(UNK, b"<unk>"), (5, b" b")], "\u00e9 b", [0, 2]),
        ([(5, b"a"), (UNK, b"<unk>"), (6, b"b")], "a\u65e5\u672cb", [0, 1, 7]),
        ([(UNK, b"<unk>"), (UNK, b"<unk>"), (6, b"b")], "\u65e5\u672cb", [0, 3, 6]),
        ([(BOS, b"<s>"), (UNK, b"<unk>"), (6, b"b")], "\u65e5\u672cb", [0, 0, 6]),
        ([(BOS, b"<s>"), (6, b" b"), (EOS, b"</s>")], "b", [0, 0, 1]),
        ([(5, b"a"), (UNK, b"<unk>")], "a\u65e5", [0, 1]),
        ([(UNK, b"<unk>"), (5, b"a")], "<unk>a", [0, 5]),
        ([(5, b"a"), (7, b"\xe2"), (6, b"b")], "a\ufffdb", [0, 1, 4]),
        ([(UNK, b"<unk>")] * 7 + [(5, b"a")], "\u65e5" * 7 + "a", [0, 3, 6, 9, 12, 15, 18, 21]),
    ],
)
def test_a_token_stands_where_the_text_has_it(
    tokens: list[tuple[int, bytes]], text: str, begins: list[int]
) -> None:
    assert placed(tokens, text) == begins


@given(st.text("ab \u00e9\u65e5\U0001f600", max_size=30))
def test_what_a_tokenizer_knows_stands_where_it_found_it(text: str) -> None:
    """One character a token, two of them unknown to it."""
    vocab = {"<unk>": UNK, "a": 3, "b": 4, " ": 5, "\u65e5": 6}
    model = tokenizers.models.BPE(vocab, [], unk_token="<unk>", fuse_unk=False)
    found = tokenizers.Tokenizer(model).encode(text)
    names = {number: name.encode() for name, number in vocab.items()}
    begins = placed([(i, names[i]) for i in found.ids], text)
    assert begins == [len(text[:start].encode()) for start, _ in found.offsets]


@given(st.lists(st.tuples(st.integers(0, 3), st.binary(max_size=3)), max_size=20), st.text())
def test_no_tokens_stand_outside_the_text(tokens: list[tuple[int, bytes]], text: str) -> None:
    found = rooms([i for i, _ in tokens], [raw for _, raw in tokens], text.encode())
    assert len(found) == len(tokens)
    assert all(room >= 0 for room in found)
    assert sum(found) <= len(text.encode())


def test_a_prompt_of_unknown_words_is_placed_in_linear_time() -> None:
    text = "\u65e5" * 40_000
    began = time.process_time()
    rooms([UNK] * 40_000, [b"<unk>"] * 40_000, text.encode())
    assert time.process_time() - began < 5
