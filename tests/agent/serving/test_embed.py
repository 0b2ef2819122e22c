"""Embeddings over a real gRPC server, driven by the product's own clients."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import grpc
import numpy as np
import pytest

from remora_agent.client import AsyncClient
from remora_contract.errors import (
    DeadlineExceeded,
    InvalidInput,
    NotFound,
    PromptTooLong,
    RequestInvalid,
    Unsupported,
)
from remora_protos.inference.v1 import inference_pb2 as pb
from remora_protos.inference.v1 import inference_pb2_grpc as rpc
from tests.support.reference_engine import HIDDEN


def wanted(served, text: str, mix: dict[str, float] | None = None) -> np.ndarray:
    """[tokens, HIDDEN] of the reference engine, alone."""
    weights = {served.digests[n]: w for n, w in (mix or {}).items()}
    state, states = np.zeros(HIDDEN), []
    for token in served.client.tokenize(text).ids:
        state = served.engine._next(state, token, weights)
        states.append(state)
    return np.array(states)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def test_texts_become_vectors_in_their_order(served, world):
    found = served.client.embed(["hello", "you there", "x"])
    for vector, text in zip(found.vectors, ["hello", "you there", "x"], strict=True):
        assert np.abs(np.array(vector) - unit(wanted(served, text)[-1])).max() < 1e-6
    assert found.prompt_tokens == (5, 9, 1)
    assert found.provenance.bundle_digest == world.bundle("base").digest
    assert found.provenance.engine_digest == served.engine.digest


def test_pooling_and_length_are_as_asked(served):
    states = wanted(served, "hello")
    mean = served.client.embed("hello", pooling="mean").vectors
    assert len(mean) == 1 and np.abs(np.array(mean[0]) - unit(states.mean(axis=0))).max() < 1e-6
    raw = served.client.embed("hello", normalize=False).vectors[0]
    assert np.abs(np.array(raw) - states[-1]).max() < 1e-6


@pytest.mark.parametrize(
    ("choice", "mix"),
    [
        ({"adapter": "a"}, {"a": 1.0}),
        ({"adapter": "b@r1"}, {"b": 1.0}),
        ({"adapter": {"a": 0.5, "b": -1.5}}, {"a": 0.5, "b": -1.5}),
        ({"use_case": "both"}, {"a": 0.5, "b": 0.25}),
    ],
)
def test_each_way_to_choose_adapters_takes_effect(served, choice, mix):
    found = served.client.embed(["hello"], normalize=False, **choice)
    assert np.abs(np.array(found.vectors[0]) - wanted(served, "hello", mix)[-1]).max() < 1e-6
    assert {a.name: a.weight for a in found.provenance.adapters} == mix


def test_token_ids_are_used_as_they_are(served):
    ids = served.client.tokenize("hello").ids
    text = served.client.embed("hello").vectors[0]
    assert served.client.embed(list(ids)).vectors == (text,)
    assert served.client.embed([list(ids), list(ids)]).vectors == (text, text)


def test_the_async_client_embeds_too(served):
    async def ask():
        async with AsyncClient(served.address, timeout_s=30) as client:
            return await asyncio.gather(*(client.embed(f"text {i}") for i in range(8)))

    for i, found in enumerate(asyncio.run(ask())):
        assert found.vectors == served.client.embed(f"text {i}").vectors


def test_generation_beside_a_long_list_answers_as_alone(served):
    got = []
    texts = [f"text {i}" * 3 for i in range(60)]
    thread = threading.Thread(target=lambda: got.append(served.client.embed(texts)))
    thread.start()
    for _ in range(5):
        result = served.client.generate("hello", max_tokens=8, ignore_eos=True, adapter="a")
        assert result.token_ids == served.solo("hello", 8, {"a": 1.0})
    thread.join(30)
    assert len(got[0].vectors) == 60
    assert served.client.status().rows_busy == 0


def test_a_caller_that_goes_away_takes_its_list_with_it(served, monkeypatch):
    gate, stopped, left = threading.Event(), threading.Event(), threading.Event()
    runtime = served.stack.host._serving.model.runtime
    cancel = runtime.cancel
    monkeypatch.setattr(runtime, "cancel", lambda name: (cancel(name), left.set())[0])

    def wait():
        stopped.set()
        assert gate.wait(20)

    served.engine.before_step = wait
    with grpc.insecure_channel(served.address) as channel:
        request = pb.EmbedRequest(inputs=[pb.EmbedInput(text="x")] * 100)
        call = rpc.InferenceStub(channel).Embed.future(request)
        assert stopped.wait(20)
        call.cancel()
        assert left.wait(20)  # the server has heard of it
        served.engine.before_step = lambda: None
        gate.set()
        result = served.client.generate("hello", max_tokens=4, ignore_eos=True)
        assert result.token_ids == served.solo("hello", 4)
    assert len(served.engine.calls.embeds) < 50


def test_a_timeout_is_the_deadline_of_the_whole_list(served):
    gate = threading.Event()
    served.engine.before_step = lambda: gate.wait(20)
    with grpc.insecure_channel(served.address) as channel:
        request = pb.EmbedRequest(inputs=[pb.EmbedInput(text="x")] * 100)
        with pytest.raises(grpc.RpcError) as caught:
            rpc.InferenceStub(channel).Embed(request, timeout=0.3)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    gate.set()


def test_use_cases_count_their_embeddings(served):
    served.client.embed(["hello", "x"], use_case="both")
    (counts,) = served.client.use_case_counts()
    assert (counts.use_case, counts.requests, counts.prompt_tokens) == ("both", 1, 6)
    assert counts.completion_tokens == counts.requests_failed == 0


@pytest.mark.parametrize(
    ("inputs", "options", "error", "words"),
    [
        ([], {}, RequestInvalid, "give 1 to 256"),
        (["x"] * 257, {}, RequestInvalid, "not 257"),
        (["x", ""], {}, RequestInvalid, r"inputs\[1\]: text: the prompt is empty"),
        ([[1], []], {}, RequestInvalid, r"inputs\[1\]: token_ids: the prompt is empty"),
        ([[1], [10**6]], {}, RequestInvalid, r"inputs\[1\]: token 1000000 is outside"),
        ("x" * 5000, {}, PromptTooLong, r"inputs\[0\]: the prompt has 5000 tokens"),
        ("x", {"adapter": "no"}, NotFound, "no"),
        ("x", {"use_case": "no"}, NotFound, "no"),
        ("x", {"adapter": "a", "use_case": "both"}, RequestInvalid, "not both"),
        ("x", {"adapter": {}}, RequestInvalid, "empty"),
        ("x", {"pooling": "max"}, RequestInvalid, "'max' is not one of last, mean"),
        ([3.5], {}, RequestInvalid, "cannot be sent"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_name(served, inputs, options, error, words):
    with pytest.raises(InvalidInput if error is PromptTooLong else error, match=words):
        served.client.embed(inputs, **options)


def test_a_message_of_wrong_form_is_refused_by_name(served):
    with grpc.insecure_channel(served.address) as channel:
        stub = rpc.InferenceStub(channel)
        for request, words in (
            (pb.EmbedRequest(inputs=[pb.EmbedInput()]), "inputs[0]: set one of text, token_ids"),
            (pb.EmbedRequest(inputs=[pb.EmbedInput(text="x")], pooling=7), "pooling: 7"),
            (
                pb.EmbedRequest(inputs=[pb.EmbedInput(text="x")], adapters=pb.AdapterMix()),
                "the mix is empty",
            ),
        ):
            with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT") as caught:
                stub.Embed(request)
            assert words in caught.value.details()


def test_an_engine_without_states_says_so(served):
    runtime = served.stack.host._serving.model.runtime
    blind = replace(runtime._intake.limits, hidden=0)
    runtime._intake = replace(runtime._intake, limits=blind)
    with pytest.raises(Unsupported, match="cannot embed"):
        served.client.embed("x")


def test_a_list_whose_deadline_passes_leaves_no_row(served):
    served.client._timeout_s = 0.0001
    with pytest.raises(DeadlineExceeded):
        served.client.embed(["x"] * 50)
    served.client._timeout_s = 30
    assert served.client.embed("x").prompt_tokens == (1,)
