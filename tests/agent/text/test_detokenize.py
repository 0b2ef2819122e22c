"""Incremental detokenisation: joined pieces are the whole text, and no piece splits a character."""

import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from remora_agent.text.detokenize import MAX_WINDOW, REPLACEMENT, Detokenizer
from remora_agent.text.tokenizer import TextTokenizer
from tests.support.runtime import byte_tokenizer

BYTE = byte_tokenizer()
TEXT = st.text(st.characters(codec="utf-8", exclude_characters=REPLACEMENT), max_size=40)


def metaspace_tokenizer() -> tokenizers.Tokenizer:
    """As sentencepiece models of the Llama 2 kind: ▁ words, byte fallback, first space dropped."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words += ["▁", "▁the", "▁fish", "es", "s", "▁a", "é", "!"]
    words += [chr(c) for c in range(33, 127) if chr(c) not in words]
    t = tokenizers.Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    t.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    t.add_special_tokens(["<unk>", "<s>", "</s>"])
    return t


META = metaspace_tokenizer()


def pieces(tokenizer, ids, prompt=()):
    text = TextTokenizer(tokenizer, 1 << 20)
    detokenizer = Detokenizer(text.decode, prompt)
    return [detokenizer.push(i) for i in ids]


@given(TEXT)
def test_byte_tokens_join_to_the_text_and_no_piece_holds_half_a_character(text):
    ids = BYTE.encode(text).ids
    got = pieces(BYTE, ids)
    assert "".join(got) == text
    assert all(REPLACEMENT not in p for p in got)


@given(TEXT, TEXT)
@example("\U00010000" * 2, "\U00010000")  # a context of bytes alone, and a character of four
def test_byte_fallback_tokens_continue_the_prompt_with_its_spaces(prompt, text):
    ids = META.encode(prompt + text).ids
    cut = len(META.encode(prompt).ids)
    before, whole = META.decode(ids[:cut]), META.decode(ids)
    if REPLACEMENT in before or not whole.startswith(before):
        return  # the prompt's own end is not at a character's border
    assert before + "".join(pieces(META, ids[cut:], ids[:cut])) == whole


def test_a_character_after_a_prompt_that_ends_in_bytes_comes_out_whole():
    """The bytes before it and its own are one run for the decoder until it is complete."""
    fish, prompt = META.encode("🐟").ids[-4:], META.encode("🐟🐟").ids
    assert pieces(META, fish, prompt) == ["", "", "", "🐟"]


def test_the_space_before_a_word_survives_the_border_of_the_prompt():
    the, fish = META.token_to_id("▁the"), META.token_to_id("▁fish")
    assert pieces(META, [fish, fish], prompt=[the]) == [" fish", " fish"]
    assert pieces(META, [fish, fish]) == ["fish", " fish"]


def test_a_character_comes_out_with_its_last_byte():
    assert pieces(BYTE, BYTE.encode("é🐟").ids) == ["", "é", "", "", "", "🐟"]


def test_special_tokens_have_no_text():
    eos = BYTE.token_to_id("<eos>")
    assert pieces(BYTE, [*BYTE.encode("a").ids, eos, *BYTE.encode("b").ids]) == ["a", "", "b"]


def test_endless_broken_bytes_neither_stop_the_text_nor_grow_the_window():
    stray = BYTE.encode("é").ids[1]  # a continuation byte with nothing before it
    text = TextTokenizer(BYTE, 1 << 20)
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return text.decode(ids)

    detokenizer = Detokenizer(decode, ())
    got = "".join(detokenizer.push(stray) for _ in range(500))
    assert 450 < len(got) < 500 and set(got) == {REPLACEMENT}
    assert longest <= MAX_WINDOW + 1
    got += "".join(detokenizer.push(i) for i in BYTE.encode("fish").ids)
    assert got == REPLACEMENT * 500 + "fish"
    assert detokenizer.flush() == ""


@given(st.lists(st.integers(0, 255), max_size=200))
def test_any_bytes_come_out_as_the_whole_decoding_the_last_with_the_flush(ids):
    detokenizer = Detokenizer(TextTokenizer(BYTE, 1 << 20).decode, ())
    whole, got = BYTE.decode(ids), "".join(detokenizer.push(i) for i in ids)
    assert whole.startswith(got)
    assert whole[len(got) :].strip(REPLACEMENT) == ""
    assert got + detokenizer.flush() == whole
    assert detokenizer.flush() == ""


def test_byte_fallback_flushes_what_is_held_back_at_the_end():
    first = META.token_to_id("<0xE6>")
    detokenizer = Detokenizer(TextTokenizer(META, 1 << 20).decode, ())
    assert [detokenizer.push(i) for i in (META.token_to_id("!"), first, first)] == ["!", "", ""]
    assert detokenizer.flush() == REPLACEMENT * 2


def test_tokens_that_each_end_inside_a_character_still_flow():
    """One token is the end of a character and the begin of the next."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)}
    ((first, second),) = [w for w, _ in pre_tokenizers.ByteLevel(False).pre_tokenize_str("é")]
    first_id, second_id = vocab[first], vocab[second]
    vocab[second + first] = len(vocab)
    t = tokenizers.Tokenizer(models.BPE(vocab, [(second, first)]))
    t.decoder = decoders.ByteLevel()
    ids = [first_id, *[vocab[second + first]] * 200, second_id]
    got = pieces(t, ids)
    assert "".join(got) == "é" * 201
    assert got[0] == "" and all(p == "é" for p in got[1:])
