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
