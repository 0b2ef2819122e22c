"""Loading and bounds of the tokenizer."""

import threading

import pytest

from remora_agent.text.pipeline import TextPipeline
from remora_agent.text.tokenizer import TextTokenizer
from remora_contract.errors import ArtifactInvalid, PromptTooLong, RequestInvalid
from tests.support.runtime import byte_tokenizer


def save(bundle, tokenizer):
    (bundle / "tokenizer").mkdir(parents=True)
    tokenizer.save(str(bundle / "tokenizer" / "tokenizer.json"))


def test_text_round_trips_and_special_tokens_are_recognised(tmp_path):
    save(tmp_path, byte_tokenizer())
    text = TextPipeline.load(tmp_path)
    encoded = text.encode("fish é<eos>")
    assert encoded.token_ids[-1] == 256
    assert text.decode(encoded.token_ids) == "fish é"
    assert text.decode(encoded.token_ids, keep_special_tokens=True) == "fish é<eos>"


def test_truncation_and_padding_stored_in_the_file_are_switched_off(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    save(tmp_path, tokenizer)
    assert len(TextPipeline.load(tmp_path).encode("fishes").token_ids) == 6


def test_text_past_the_bound_names_both_numbers():
    text = TextTokenizer(byte_tokenizer(), 8)
    with pytest.raises(PromptTooLong, match=r"10 bytes.*8"):
        text.encode("é" * 5, add_special_tokens=True)


def test_other_threads_go_on_while_a_long_text_is_encoded():
    """Or a prompt that is too long would stop every running stream for seconds."""
    text, tokenizer = "the long text " * 100_000, TextTokenizer(byte_tokenizer(), 4 << 20)
    encoded, beats = [], 0

    def encode():
        encoded.append(tokenizer.encode(text, add_special_tokens=False))

    thread = threading.Thread(target=encode)
    thread.start()
    while not encoded:
        thread.join(0.002)
        beats += 1
    assert len(encoded[0]) == len(text)
    assert beats > 20  # one or two with Python's lock held all the while


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(RequestInvalid, match="half a character"):
        TextTokenizer(byte_tokenizer(), 8).encode("a\ud800", add_special_tokens=True)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b'{"model": 3}'])
def test_a_broken_tokenizer_file_is_named(tmp_path, content):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_bytes(content)
    with pytest.raises(ArtifactInvalid, match=r"tokenizer\.json"):
        TextPipeline.load(tmp_path)


def test_a_missing_tokenizer_says_what_to_do(tmp_path):
    with pytest.raises(ArtifactInvalid, match="export the checkpoint again"):
        TextPipeline.load(tmp_path)


@pytest.mark.parametrize("token", [-1, 1 << 32])
def test_an_impossible_id_is_refused(tmp_path, token):
    save(tmp_path, byte_tokenizer())
    with pytest.raises(RequestInvalid):
        TextPipeline.load(tmp_path).decode([token])


def test_an_id_without_a_token_has_no_text(tmp_path):
    save(tmp_path, byte_tokenizer())
    assert TextPipeline.load(tmp_path).decode([70000]) == ""
