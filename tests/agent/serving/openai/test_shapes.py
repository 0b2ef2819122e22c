"""Replies as values: what events become, without a server."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from remora_agent.runtime.api import (
    Accepted,
    AnsweringAdapter,
    Delta,
    Finished,
    FinishReason,
    PromptScored,
    Provenance,
    Timings,
    TokenLogprob,
    ToolCall,
    Usage,
)
from remora_agent.serving.openai.chat_reply import ChatResponse, Reply
from remora_agent.serving.openai.completion_reply import CompletionParts, CompletionResponse
from remora_agent.serving.openai.logprobs import CompletionLogprobs, chat_logprobs
from remora_agent.serving.openai.usage import fingerprint, finish_reason, usage
from remora_agent.text.pipeline import Encoded
from remora_contract.errors import InternalFault, Unavailable

PROVENANCE = Provenance("sha256:b", "sha256:e", (AnsweringAdapter("a", "1", "sha256:a", 0.5),))


SPECIAL = 300


def letter(token_id: int) -> bytes:
    return b"<s>" if token_id == SPECIAL else bytes([token_id])


def reply(*, n: int = 1, scored: bool = False) -> Reply:
    return Reply("id", 0, "m", n, scored, letter, lambda token_id: token_id == SPECIAL)


def finished(
    reason: FinishReason = FinishReason.STOP, calls: tuple[ToolCall, ...] = (), prompt: int = 3
) -> Finished:
    times = Timings(0, 0, 0, 0)
    return Finished(reason, Usage(prompt, 1, 2), times, PROVENANCE, tool_calls=calls)


def test_a_prompt_that_is_repeated_with_logprobs_comes_with_its_own():
    made = reply(scored=True)
    parts = CompletionParts(made, 1, [Encoded("ab", (97, 98))], 1)
    response = CompletionResponse(made, parts, 1)
    for event in (
        Accepted("r", PROVENANCE),
        PromptScored((TokenLogprob(98, -0.5, ((99, -0.1),)),)),
        Delta("c", (99,), (TokenLogprob(99, -0.25, ((99, -0.25),)),)),
        finished(),
    ):
        response.add(0, event)
    (choice,) = response.response()["choices"]
    assert choice["text"] == "abc"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -0.5, -0.25],
        "top_logprobs": [None, {"c": -0.1}, {"c": -0.25}],
        "text_offset": [0, 1, 2],
    }


def offsets(made: dict[str, Any]) -> list[int]:
    return made["text_offset"]


def test_offsets_count_the_text_that_the_caller_gets():
    """Hidden special tokens take no room, half a character is where the character is."""

    def scores() -> CompletionLogprobs:
        return CompletionLogprobs(letter, lambda token_id: token_id == SPECIAL, 0)

    def scored(*ids: int) -> list[TokenLogprob]:
        return [TokenLogprob(i, -1.0) for i in ids]

    answer = scores()
    assert offsets(answer.part(scored(97, SPECIAL, 0xC3))) == [0, 1, 1]
    assert offsets(answer.part(scored(0xA9, 98))) == [1, 2]
    added = scores()  # by the tokenizer, before a prompt given as text
    assert offsets(added.prompt((SPECIAL, 97, 98), scored(97, 98), "ab")) == [0, 0, 1]
    assert offsets(added.part(scored(99))) == [2]
    unknown = scores()  # <unk>, for letters that the vocabulary lacks
    assert offsets(unknown.prompt((97, SPECIAL, 98), scored(SPECIAL, 98), "a\u65e5\u672cb")) == [
        0,
        1,
        3,
    ]
    assert offsets(unknown.part(scored(99))) == [4]
    shown = scores()  # of a prompt given as tokens
    assert offsets(shown.prompt((SPECIAL, 97), scored(97), "<s>a")) == [0, 3]
    assert offsets(shown.part(scored(99))) == [4]


def test_what_follows_half_a_character_begins_behind_it():
    """Bytes that nobody goes on with are a U+FFFD of their own in the text."""
    ids = (0xE2, 126, 0xF0, 0x9F, 0xC3, 0xA9, 0xFF, 0xE4, 98)
    scored = [TokenLogprob(i, -1.0) for i in ids]
    text = bytes(ids).decode(errors="replace")
    for parts in ([scored], [[t] for t in scored]):
        answer = CompletionLogprobs(letter, lambda token_id: token_id == SPECIAL, 0)
        made = [at for part in parts for at in offsets(answer.part(part))]
        assert made == [0, 1, 2, 2, 3, 3, 4, 5, 6]
        assert [text[at] for at in made] == list("\ufffd~\ufffd\ufffdéé\ufffd\ufffdb")


def test_what_has_no_probability_is_still_json():
    impossible = TokenLogprob(97, -math.inf, ((98, -math.inf),))
    text = json.dumps(chat_logprobs([impossible], letter), allow_nan=False)
    assert json.loads(text)["content"][0]["logprob"] == -9999.0


def test_a_prompts_tokens_count_once_for_its_answers():
    ended = [finished(prompt=3), finished(prompt=3), finished(prompt=5), finished(prompt=5)]
    assert usage(ended, 2) == {
        "prompt_tokens": 8,
        "completion_tokens": 8,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_the_reason_says_whether_tools_are_called():
    call = (ToolCall("c", "f", "{}"),)
    assert finish_reason(finished()) == "stop"
    assert finish_reason(finished(calls=call)) == "tool_calls"
    assert finish_reason(finished(FinishReason.LENGTH, call)) == "length"
    with pytest.raises(Unavailable):
        finish_reason(finished(FinishReason.CANCELLED))


def test_the_fingerprint_follows_every_digest_and_weight():
    adapter = AnsweringAdapter("a", "1", "sha256:a", 0.25)
    others = {
        fingerprint(PROVENANCE),
        fingerprint(Provenance("sha256:x", "sha256:e", PROVENANCE.adapters)),
        fingerprint(Provenance("sha256:b", "sha256:x", PROVENANCE.adapters)),
        fingerprint(Provenance("sha256:b", "sha256:e")),
        fingerprint(Provenance("sha256:b", "sha256:e", (adapter,))),
    }
    assert len(others) == 5


def test_an_answer_without_an_end_is_a_fault_and_not_an_answer():
    response = ChatResponse(reply(n=2), 2)
    response.add(0, finished())
    with pytest.raises(InternalFault):
        response.response()
