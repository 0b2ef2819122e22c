"""Bytes of tokens: joined, they are what the tokenizer itself decodes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from remora_agent.text.vocabulary import token_bytes
from remora_contract.errors import Unsupported
from tests.support.runtime import byte_tokenizer


def pieces_tokenizer() -> Tokenizer:
    """As Llama 2, Mistral and Gemma: pieces with U+2581, bytes as <0x..>."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    words += ["\u2581", "\u2581the", "the", "\u2581\u2581", "é", "日本", "a\u2581b", "<0x0>"]
    tokenizer = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


PIECES, BYTES = pieces_tokenizer(), byte_tokenizer()
BYTES.add_tokens([AddedToken("<tool> é", normalized=False)])


@given(st.data(), st.sampled_from([PIECES, BYTES]))
def test_joined_they_are_the_tokenizers_decoding(data, tokenizer):
    vocab = tokenizer.get_vocab_size()
    tokens, special = token_bytes(tokenizer, vocab + 3)
    ids = data.draw(st.lists(st.integers(0, vocab - 1), max_size=12))
    ids = [i for i in ids if i not in special]
    joined = b"".join(tokens[i] for i in ids)
    try:
        text = joined.decode()
    except UnicodeDecodeError:
        return  # each decoder has its own way with broken characters
    if tokenizer is PIECES and text.startswith(" "):
        text = text[1:]  # taken off before the first word of a whole text
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_told_apart_and_gaps_are_empty():
    tokens, special = token_bytes(PIECES, PIECES.get_vocab_size() + 2)
    assert special == [0, 1, 2]
    assert tokens[-1] == b"" and tokens[PIECES.token_to_id("<tool>")] == b"<tool>"
    assert token_bytes(PIECES, 2)[0] == [b"<unk>", b"<s>"]


@pytest.mark.parametrize(
    "decoder", [decoders.WordPiece(), None, decoders.Replace("x", "y"), decoders.CTC()]
)
def test_another_family_of_tokenizers_is_refused_by_name(decoder):
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    if decoder is not None:
        tokenizer.decoder = decoder
    with pytest.raises(Unsupported, match="decoder"):
        token_bytes(tokenizer, 1)
