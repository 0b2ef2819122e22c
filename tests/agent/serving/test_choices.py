"""n, echo, logprobs and penalties over a real gRPC server, driven by the product's own client."""

from __future__ import annotations

import asyncio

import pytest

from remora_agent.client import AsyncClient, Delta
from remora_agent.runtime import bounds
from remora_agent.serving import inference_service
from remora_contract.errors import RequestInvalid

OPTIONS = {"max_tokens": 8, "ignore_eos": True, "temperature": 1.0}


def test_n_answers_are_those_of_n_requests_with_the_next_seeds(served):
    result = served.client.generate("hello", n=3, seed=5, **OPTIONS)
    answers = [result, *result.more]
    alone = [served.client.generate("hello", seed=5 + i, **OPTIONS) for i in range(3)]
    assert [a.token_ids for a in answers] == [a.token_ids for a in alone]
    assert len({a.token_ids for a in answers}) > 1
    assert {a.request_id for a in answers} == {result.request_id}


def test_the_last_seed_is_followed_by_the_first(served):
    result = served.client.generate("hello", n=2, seed=2**64 - 1, **OPTIONS)
    alone = served.client.generate("hello", seed=0, **OPTIONS)
    assert result.more[0].token_ids == alone.token_ids


def test_a_stream_tells_the_answers_apart(served):
    stream = served.client.stream("hello", n=3, seed=5, **OPTIONS)
    deltas = list(stream)
    for i, answer in enumerate([stream.result, *stream.result.more]):
        mine = [d for d in deltas if d.choice == i]
        assert "".join(d.text for d in mine) == answer.text
        assert tuple(t for d in mine for t in d.token_ids) == answer.token_ids
    assert {d.choice for d in deltas} == {0, 1, 2}


def test_cancelling_the_request_ends_all_its_answers(served):
    served.engines.gate.clear()
    stream = served.client.stream("hello", n=3, request_id="mine", **OPTIONS)
    assert served.client.cancel("mine")
    served.engines.gate.set()
    list(stream)
    reasons = {a.finish_reason.value for a in (stream.result, *stream.result.more)}
    assert reasons == {"cancelled"}
    assert not served.client.cancel("mine")


@pytest.mark.parametrize("n", [65, 2**31])
def test_too_many_answers_are_refused(served, n):
    with pytest.raises(RequestInvalid, match="n must be"):
        served.client.generate("x", n=n, **OPTIONS)


@pytest.mark.parametrize("prompt", ["hé <b>", [104, 105, 256]])
def test_echo_puts_the_prompt_before_each_answer_and_no_tokens(served, prompt):
    plain = served.client.generate(prompt, seed=1, n=2, **OPTIONS)
    echoed = served.client.generate(prompt, seed=1, n=2, echo=True, **OPTIONS)
    ids = prompt if isinstance(prompt, list) else None
    shown = served.client.detokenize(ids, keep_special_tokens=True) if ids else prompt
    for with_prompt, without in zip((echoed, *echoed.more), (plain, *plain.more), strict=True):
        assert with_prompt.text == shown + without.text
        assert with_prompt.token_ids == without.token_ids
    stream = served.client.stream(prompt, seed=1, echo=True, **OPTIONS)
    assert next(stream) == Delta(shown, ())


def test_a_chat_is_echoed_as_the_template_renders_it(served):
    chat = [{"role": "user", "content": "hi"}]
    assert served.client.generate(chat, echo=True, **OPTIONS).text.startswith("u:hi\na:")


def test_logprobs_come_with_their_tokens_in_streams_and_whole(served):
    options = {**OPTIONS, "seed": 3, "logprobs": 2}
    result = served.client.generate("hello", **options)
    assert [p.token_id for p in result.logprobs] == list(result.token_ids)
    assert all(len(p.top) == 2 and p.logprob <= p.top[0][1] <= 0 for p in result.logprobs)
    stream = served.client.stream("hello", **options)
    for delta in stream:
        assert [p.token_id for p in delta.logprobs] == list(delta.token_ids)
    assert stream.result.logprobs == result.logprobs
    assert served.client.generate("hello", logprobs=0, **OPTIONS).logprobs[0].top == ()
    assert served.client.generate("hello", **OPTIONS).logprobs == ()


def test_penalties_and_biases_reach_the_sampler(served):
    greedy = {**OPTIONS, "temperature": 0.0}
    plain = served.client.generate("hello", **greedy)
    first = plain.token_ids[0]
    assert (
        served.client.generate("hello", logit_bias={first: -100.0}, **greedy).token_ids[0] != first
    )
    only = served.client.generate("hello", logit_bias={7: 100.0}, **greedy)
    assert only.token_ids == (7,) * 8
    varied = served.client.generate(
        "hello", logit_bias={7: 100.0, 9: 99.0}, frequency_penalty=2.0, **greedy
    )
    assert set(varied.token_ids) == {7, 9}


def test_a_bias_of_a_token_that_the_model_has_not_is_refused(served):
    with pytest.raises(RequestInvalid, match="token 258 is outside the vocabulary"):
        served.client.generate("x", logit_bias={258: 1.0}, **OPTIONS)


def test_min_tokens_beyond_max_tokens_is_refused(served):
    with pytest.raises(RequestInvalid, match="min_tokens"):
        served.client.generate("x", min_tokens=9, **OPTIONS)


def test_the_async_client_takes_the_same_options(served):
    async def ask():
        async with AsyncClient(served.address, timeout_s=30) as client:
            stream = await client.stream("hello", n=2, seed=5, logprobs=1, **OPTIONS)
            deltas = [d async for d in stream]
            return deltas, stream.result

    deltas, result = asyncio.run(ask())
    assert {d.choice for d in deltas} == {0, 1}
    assert len(result.more) == 1 and len(result.more[0].logprobs) == 8


def test_an_answer_longer_than_a_message_is_refused_whole_and_streams(served, monkeypatch):
    monkeypatch.setattr(inference_service, "MAX_MESSAGE_BYTES", 1000)
    options = {**OPTIONS, "logprobs": 20, "seed": 1}
    with pytest.raises(RequestInvalid, match="as a stream"):
        served.client.generate("hello", **options)
    stream = served.client.stream("hello", **options)
    assert len(list(stream)) >= 1 and len(stream.result.logprobs) == 8


def test_a_prompt_is_scored_once_for_all_answers_and_each_has_the_scores(served):
    alone = served.client.generate("hello", seed=5, prompt_logprobs=2, **OPTIONS)
    assert [p.token_id for p in alone.prompt_logprobs] == list(served.client.tokenize("hello").ids)[
        1:
    ]
    before = len(served.engine.calls.scores)
    result = served.client.generate("hello", n=3, seed=5, prompt_logprobs=2, **OPTIONS)
    for answer in (result, *result.more):
        assert answer.prompt_logprobs == alone.prompt_logprobs
    assert [start for _, start, _ in served.engine.calls.scores[before:]].count(0) == 1


def test_the_bound_of_prompt_scores_is_that_of_all_answers_together(served, monkeypatch):
    monkeypatch.setattr(bounds, "MAX_PROMPT_LOGPROBS", 30)
    served.client.generate("hello", n=3, prompt_logprobs=1, **OPTIONS)
    with pytest.raises(RequestInvalid, match="20 prompt tokens of 4 answers are 40 values"):
        served.client.generate("hello", n=4, prompt_logprobs=1, **OPTIONS)
