"""Plain completions and the tokenizer's endpoints."""

from __future__ import annotations

from remora_agent.client import Client

GREEDY = {"model": "base", "max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}}


def solo(http, text: str) -> str:
    with Client(http.grpc) as client:
        return client.detokenize(http.engine.solo(client.tokenize(text).ids, 8))


def test_prompts_in_every_form_are_answered_in_their_order(http):
    with Client(http.grpc) as client:
        ids = {t: list(client.tokenize(t).ids) for t in ("one", "two")}
    for prompt in (["one", "two"], [ids["one"], ids["two"]]):
        reply = http.client.completions.create(prompt=prompt, **GREEDY)
        assert [c.text for c in reply.choices] == [solo(http, "one"), solo(http, "two")]
        assert [c.index for c in reply.choices] == [0, 1]
        assert reply.usage.prompt_tokens == 6
    for prompt in ("one", ids["one"]):
        assert http.client.completions.create(prompt=prompt, **GREEDY).choices[0].text == solo(
            http, "one"
        )


def test_n_answers_for_each_of_several_prompts(http):
    reply = http.client.completions.create(prompt=["one", "two"], n=2, **GREEDY)
    texts = [c.text for c in reply.choices]
    assert texts == [solo(http, "one")] * 2 + [solo(http, "two")] * 2
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (6, 32)


def test_the_smallest_temperature_answers_as_none_does_and_harms_nobody(http):
    """JSON carries doubles; logits are divided as float32."""
    for temperature in (1e-300, 5e-324):
        cold = {**GREEDY, "temperature": temperature}
        reply = http.client.completions.create(prompt="one", top_p=0.9, **cold)
        assert reply.choices[0].text == solo(http, "one")


def test_echo_begins_with_the_prompt_streamed_and_not(http):
    reply = http.client.completions.create(prompt=["one", "two"], echo=True, **GREEDY)
    wanted = ["one" + solo(http, "one"), "two" + solo(http, "two")]
    assert [c.text for c in reply.choices] == wanted
    parts = ["", ""]
    for chunk in http.client.completions.create(
        prompt=["one", "two"], echo=True, stream=True, **GREEDY
    ):
        parts[chunk.choices[0].index] += chunk.choices[0].text
    assert parts == wanted


def test_a_stream_ends_with_usage_when_asked(http):
    stream = http.client.completions.create(
        prompt="one", stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == solo(http, "one")
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 8
    assert chunks[-2].choices[0].finish_reason == "length"


def test_text_becomes_tokens_and_text_again(http):
    text = "Grüße, 世界"
    made = http.raw.post(
        "/tokenize", json={"model": "a", "prompt": text, "return_token_strs": True}
    ).json()
    assert made["count"] == len(made["tokens"]) == len(text.encode())
    assert made["max_model_len"] == 512
    assert made["token_strs"][2:4] == ["bytes:\\xc3", "bytes:\\xbc"]
    back = http.raw.post("/detokenize", json={"model": "a", "tokens": made["tokens"]})
    assert back.json() == {"prompt": text}


def test_tokenizing_needs_a_known_model_and_one_input(http):
    for body, status in (
        ({"model": "nobody", "prompt": "x"}, 404),
        ({}, 400),
        ({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, 400),
        ({"prompt": "x", "unknown": 1}, 400),
        ({"prompt": ""}, 400),
    ):
        assert http.raw.post("/tokenize", json=body).status_code == status, body
    assert http.raw.post("/detokenize", json={"tokens": [-1]}).status_code == 400


def test_echo_of_token_ids_is_their_text(http):
    with Client(http.grpc) as client:
        ids = list(client.tokenize("one").ids)
    reply = http.client.completions.create(prompt=ids, echo=True, **GREEDY)
    assert reply.choices[0].text == "one" + solo(http, "one")
