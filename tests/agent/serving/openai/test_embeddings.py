"""Embeddings through the openai client."""

from __future__ import annotations

import math

import pytest

from remora_agent.client import Client


def embed(http, **fields) -> list[list[float]]:
    reply = http.client.embeddings.create(**{"model": "base", "input": "one", **fields})
    assert [e.index for e in reply.data] == list(range(len(reply.data)))
    return [list(e.embedding) for e in reply.data]


def test_vectors_are_those_of_the_agents_own_client_in_both_encodings(http):
    with Client(http.grpc) as client:
        ids = [list(client.tokenize(t).ids) for t in ("one", "two")]
        wanted = [list(v) for v in client.embed(["one", "two"]).vectors]
        mixed = list(client.embed("one", adapter="a").vectors[0])
    for fields in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        if fields.get("encoding_format") == "base64":
            body = {"model": "base", "input": ["one", "two"], **fields}
            assert isinstance(
                http.raw.post("/v1/embeddings", json=body).json()["data"][0]["embedding"], str
            )
            continue
        assert embed(http, input=["one", "two"], **fields) == wanted
        assert embed(http, input=ids, **fields) == wanted
        assert embed(http, input=ids[0], **fields) == wanted[:1]
    assert embed(http, model="a") == [mixed] != wanted[:1]


def test_length_and_pooling_are_choices(http):
    (unit,) = embed(http)
    assert math.isclose(math.hypot(*unit), 1.0, rel_tol=1e-5)
    (raw,) = embed(http, extra_body={"normalize": False})
    assert not math.isclose(math.hypot(*raw), 1.0, rel_tol=1e-3)
    (mean,) = embed(http, extra_body={"pooling": "mean"})
    assert mean != unit


def test_usage_counts_all_inputs(http):
    reply = http.client.embeddings.create(model="base", input=["one", "three"])
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (8, 8)
    assert reply.model == "base"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"input": ""}, "inputs[0]"),
        ({"input": []}, "input"),
        ({"input": [""]}, "inputs[0]"),
        ({"input": ["x"] * 100_000}, "inputs"),
        ({"dimensions": 3}, "dimensions"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"pooling": "cls"}, "pooling"),
        ({"temperature": 1}, "temperature"),
        ({"model": "nobody"}, "nobody"),
    ],
)
def test_what_is_wrong_is_named(http, fields, named):
    body = {"model": "base", "input": "x", **fields}
    reply = http.raw.post("/v1/embeddings", json=body)
    assert reply.status_code in (400, 404)
    assert named in reply.json()["error"]["message"]
