"""An answer's text is the decoding of its tokens, however the answer ends."""

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from remora_agent.runtime.answer import Answer
from remora_agent.runtime.api import FinishReason, Provenance, SamplingParams
from remora_agent.runtime.sampling import Sampler
from tests.support.runtime import EOS, VOCAB, Listener, byte_text, byte_tokenizer, request

THEIRS = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer())
FISH = byte_tokenizer().encode("a🐟").ids


def answered(tokens, reason=FinishReason.CANCELLED, **wanted):
    """What a listener hears when the engine chooses `tokens`."""
    heard, text = Listener(), byte_text()
    r = request("a", (1,), **{"max_tokens": max(1, len(tokens)), **wanted})
    sampler = Sampler(SamplingParams(), 0)
    provenance = Provenance("sha256:b", "sha256:e")
    answer = Answer(r, provenance, sampler, text.detokenizer(r.prompt), {EOS}, heard, 0.0)
    for token in tokens:
        taken = answer.take(np.eye(VOCAB, dtype=np.float32)[token], 1.0)
        if taken.reason is not None:
            reason = taken.reason
            break
    answer.finish(reason, 2.0)
    return heard


def decoded(heard):
    return THEIRS.decode(list(heard.tokens), skip_special_tokens=True)


@pytest.mark.parametrize("bytes_left", [1, 2, 3, 4])
def test_an_answer_cut_inside_a_character_ends_with_what_its_tokens_decode_to(bytes_left):
    heard = answered(FISH[: 1 + bytes_left])
    assert heard.finished.reason is FinishReason.LENGTH
    assert heard.text == decoded(heard) == ("a🐟" if bytes_left == 4 else "a\ufffd")


@given(st.lists(st.integers(0, 255), max_size=120))
def test_random_tokens_come_out_as_transformers_decodes_them(tokens):
    for end in (tokens, [*tokens, EOS]):
        heard = answered(end, max_tokens=200, ignore_eos=False)
        assert heard.tokens == tuple(end)
        assert heard.text == decoded(heard)


def test_a_stop_string_that_only_the_end_completes_still_stops():
    heard = answered(FISH[:3], stop=("a\ufffd",))
    assert heard.text == ""
    assert heard.finished.reason is FinishReason.STOP
    assert heard.finished.stop_match == "a\ufffd"
    assert heard.tokens == tuple(FISH[:3])


def test_no_ending_token_is_drawn_before_min_tokens():
    """The engine would end at once; the second likeliest goes on."""
    logits = np.zeros(VOCAB, np.float32)
    logits[EOS], logits[66], logits[65] = 3, 2, 1  # 66 is a stop token
    heard, text = Listener(), byte_text()
    r = request("a", (1,), ignore_eos=False, stop_token_ids=(66, 100_000), min_tokens=3)
    sampler = Sampler(SamplingParams(), 0)
    provenance = Provenance("sha256:b", "sha256:e")
    answer = Answer(r, provenance, sampler, text.detokenizer(r.prompt), {EOS}, heard, 0.0)
    reasons = [answer.take(logits, 1.0).reason for _ in range(4)]
    assert answer.tokens == [65, 65, 65, EOS]
    assert reasons == [None, None, None, FinishReason.STOP]


def test_a_stop_string_counts_only_where_it_begins_after_min_tokens():
    ids = byte_tokenizer().encode("ab ab ab").ids
    assert answered(ids, stop=("ab",)).text == ""
    assert answered(ids, stop=("ab",), min_tokens=1).text == "ab "
    assert answered(ids, stop=("ab",), min_tokens=4).text == "ab ab "
    assert answered(ids, stop=("ab",), min_tokens=8).text == "ab ab ab"


@given(st.text("ab", max_size=40), st.text("ab", min_size=1, max_size=3), st.integers(0, 40))
def test_min_tokens_never_cuts_an_answer_short(text, stop, least):
    ids = byte_tokenizer().encode(text).ids
    heard = answered(ids, stop=(stop,), min_tokens=min(least, max(1, len(ids))))
    expected = text[:least] + text[least:].split(stop)[0]
    assert heard.text == expected
