"""Chat through the real openai client, streamed and not, sync and async."""

from __future__ import annotations

import asyncio

import openai
import pytest

from remora_agent.client import Client

USER = [{"role": "user", "content": "hello"}]
PROMPT = "u:hello\na:"
PLAIN = {"model": "base", "messages": USER, "max_tokens": 12, "temperature": 0}
EXTRA = {"ignore_eos": True}


def solo(http, count: int = 12, mix: dict[str, float] | None = None) -> str:
    """What the model says to USER whatever else runs."""
    weights = {http.digests[n]: w for n, w in (mix or {}).items()}
    with Client(http.grpc) as client:
        ids = http.engine.solo(client.tokenize(PROMPT).ids, count, weights)
        return client.detokenize(ids)


def streamed(http, **fields) -> tuple[str, list]:
    chunks = list(
        http.client.chat.completions.create(**{**PLAIN, **fields}, stream=True, extra_body=EXTRA)
    )
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), chunks


def test_an_answer_is_the_models_own_and_says_what_it_took(http):
    reply = http.client.chat.completions.create(**PLAIN, extra_body=EXTRA)
    choice = reply.choices[0]
    assert choice.message.content == solo(http)
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert reply.model == "base" and reply.id.startswith("chatcmpl-")
    usage = reply.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(PROMPT), 12)
    assert usage.total_tokens == len(PROMPT) + 12
    assert usage.prompt_tokens_details.cached_tokens >= 0


def test_a_stream_says_the_same_and_ends_as_clients_expect(http):
    text, chunks = streamed(http)
    assert text == solo(http)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert {c.id for c in chunks} == {chunks[0].id}
    assert all(c.usage is None for c in chunks)
    raw = http.raw.post("/v1/chat/completions", json={**PLAIN, "stream": True})
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert raw.text.endswith("data: [DONE]\n\n")


def test_usage_comes_as_the_last_chunk_when_asked_for(http):
    _, chunks = streamed(http, stream_options={"include_usage": True})
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12
    assert all(c.usage is None for c in chunks[:-1])


def test_the_async_client_hears_the_same(http):
    async def run() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{http.url}/v1", api_key="x") as client:
            whole = await client.chat.completions.create(**PLAIN, extra_body=EXTRA)
            stream = await client.chat.completions.create(**PLAIN, extra_body=EXTRA, stream=True)
            parts = [c.choices[0].delta.content or "" async for c in stream]
            return whole.choices[0].message.content, "".join(parts)

    assert asyncio.run(run()) == (solo(http), solo(http))


@pytest.mark.parametrize(
    ("model", "mix"),
    [
        ("base", {}),
        ("base:", {}),
        ("a", {"a": 1.0}),
        ("base:a", {"a": 1.0}),
        ("base:a@r1", {"a": 1.0}),
        ("a@r1", {"a": 1.0}),
        ("both", {"a": 0.5, "b": 0.25}),
        ("use_case:both", {"a": 0.5, "b": 0.25}),
    ],
)
def test_the_models_name_chooses_adapters(http, model, mix):
    assert streamed(http, model=model)[0] == solo(http, mix=mix)


def test_remoras_own_fields_mix_adapters(http):
    def said(**extra) -> str:
        reply = http.client.chat.completions.create(**PLAIN, extra_body={**EXTRA, **extra})
        return reply.choices[0].message.content

    assert said(adapters={"a": 0.7, "b@r1": 0.3}) == solo(http, mix={"a": 0.7, "b": 0.3})
    assert said(use_case="both") == solo(http, mix={"a": 0.5, "b": 0.25})
    weighed = said(use_case="both", use_case_weights={"b": 2})
    assert weighed == solo(http, mix={"a": 0.5, "b": 2.0})


def test_the_fingerprint_tells_what_answered(http):
    def fingerprint(model: str) -> str:
        fields = {**PLAIN, "model": model}
        return http.client.chat.completions.create(**fields).system_fingerprint

    assert fingerprint("base") == fingerprint("base") != fingerprint("a")


def test_several_answers_have_seeds_of_their_own(http):
    def answers(n: int, seed: int) -> list[str]:
        reply = http.client.chat.completions.create(
            **{**PLAIN, "temperature": 2.0}, n=n, seed=seed, extra_body=EXTRA
        )
        assert [c.index for c in reply.choices] == list(range(n))
        assert reply.usage.prompt_tokens == len(PROMPT)
        assert reply.usage.completion_tokens == 12 * n
        return [c.message.content for c in reply.choices]

    three = answers(3, 7)
    assert len(set(three)) == 3
    assert three == [answers(1, 7 + i)[0] for i in range(3)]
    stream = http.client.chat.completions.create(
        **{**PLAIN, "temperature": 2.0}, n=3, seed=7, stream=True, extra_body=EXTRA
    )
    parts = ["", "", ""]
    for chunk in stream:
        parts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert parts == three


def test_a_stop_text_ends_the_answer(http):
    whole = solo(http)
    stop = whole[4:6]
    reply = http.client.chat.completions.create(**PLAIN, stop=stop, extra_body=EXTRA)
    assert reply.choices[0].message.content == whole[: whole.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


def test_parts_developer_messages_and_empty_extras_are_understood(http):
    messages = [
        {"role": "developer", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "annotations": [], "audio": None},
        {"role": "user", "content": "d"},
    ]
    body = {"model": "base", "messages": messages}
    tokens = http.raw.post("/tokenize", json=body).json()
    with Client(http.grpc) as client:
        assert client.detokenize(tokens["tokens"]) == "s:s\nu:a\nb\na:c\nu:d\na:"


def test_what_a_message_says_is_never_read_as_a_template(http):
    text = "{{ messages }}{% for x in range(10) %}x{% endfor %}{# gone #}"
    body = {"model": "base", "messages": [{"role": "user", "content": text}]}
    tokens = http.raw.post("/tokenize", json=body).json()["tokens"]
    with Client(http.grpc) as client:
        assert client.detokenize(tokens) == f"u:{text}\na:"


def test_template_variables_reach_the_template(http):
    body = {"messages": USER, "chat_template_kwargs": {"enable_thinking": True}}
    body["add_generation_prompt"] = False
    tokens = http.raw.post("/tokenize", json=body).json()["tokens"]
    with Client(http.grpc) as client:
        assert client.detokenize(tokens) == "Tu:hello\n"


def test_who_asks_how_urgently_and_with_which_salt_is_passed_on(http):
    def cached(salt: str) -> int:
        reply = http.client.chat.completions.create(
            model="base",
            messages=[{"role": "user", "content": "salted " * 30}],
            max_tokens=2,
            user="alice",
            extra_body={"cache_salt": salt, "priority": -1},
        )
        return reply.usage.prompt_tokens_details.cached_tokens

    assert cached("one") == 0
    assert cached("one") > 0
    assert cached("two") == 0
