"""Generation over a real gRPC server, driven by the product's own client."""

from __future__ import annotations

import asyncio
import threading

import pytest

from remora_agent.client import AsyncClient, Client
from remora_agent.runtime.api import FinishReason
from remora_contract.errors import (
    Conflict,
    DeadlineExceeded,
    InvalidInput,
    NotFound,
    PromptTooLong,
    RemoraError,
    RequestInvalid,
)

OPTIONS = {"max_tokens": 8, "ignore_eos": True, "temperature": 0.0}


def test_an_answer_is_the_models_and_says_which_bytes_gave_it(served, world):
    result = served.client.generate("hello", **OPTIONS)
    assert result.token_ids == served.solo("hello", 8)
    assert result.finish_reason is FinishReason.LENGTH
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (5, 8)
    assert result.provenance.bundle_digest == world.bundle("base").digest
    assert result.provenance.engine_digest == served.engine.digest
    assert result.provenance.adapters == ()
    assert result.timings.time_to_first_token_s > 0


@pytest.mark.parametrize(
    ("choice", "mix"),
    [
        ({"adapter": "a"}, {"a": 1.0}),
        ({"adapter": "b@r1"}, {"b": 1.0}),
        ({"adapter": {"a": 0.5, "b": 0.25}}, {"a": 0.5, "b": 0.25}),
        ({"use_case": "both"}, {"a": 0.5, "b": 0.25}),
        ({"adapter": None}, {}),
    ],
)
def test_each_way_to_choose_adapters_takes_effect(served, choice, mix):
    result = served.client.generate("hello", **choice, **OPTIONS)
    assert result.token_ids == served.solo("hello", 8, mix)
    assert {a.name: a.weight for a in result.provenance.adapters} == mix
    assert all(a.digest == served.digests[a.name] for a in result.provenance.adapters)


def test_a_stream_gives_the_same_text_piece_by_piece(served):
    stream = served.client.stream("hello", adapter="a", request_id="mine", **OPTIONS)
    assert stream.request_id == "mine"
    text = "".join(d.text for d in stream)
    assert text == stream.result.text
    assert stream.result.token_ids == served.solo("hello", 8, {"a": 1.0})
    assert stream.result.provenance.adapters[0].digest == served.digests["a"]


def test_chat_goes_through_the_template_with_its_arguments(served):
    chat = [{"role": "user", "content": "hi"}]
    result = served.client.generate(messages=chat, **OPTIONS)
    assert result.token_ids == served.client.generate(chat, **OPTIONS).token_ids
    assert result.token_ids == served.solo("u:hi\na:", 8)
    thinking = served.client.generate(
        chat, template_arguments={"enable_thinking": True}, add_generation_prompt=False, **OPTIONS
    )
    assert thinking.token_ids == served.solo("Tu:hi\n", 8)


def test_token_ids_are_used_as_they_are(served):
    result = served.client.generate([1, 2, 3], **OPTIONS)
    assert result.token_ids == served.engine.solo((1, 2, 3), 8)


def test_a_seed_makes_sampling_repeatable(served):
    options = {**OPTIONS, "temperature": 1.5, "max_tokens": 24}
    first = served.client.generate("x", seed=3, **options)
    assert first.token_ids == served.client.generate("x", seed=3, **options).token_ids
    assert first.token_ids != served.client.generate("x", seed=4, **options).token_ids


def test_tokenize_and_detokenize_are_inverse(served):
    tokens = served.client.tokenize("grüße")
    assert served.client.detokenize(tokens.ids) == "grüße"
    assert served.client.tokenize([{"role": "user", "content": "x"}]).rendered == "u:x\na:"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"adapter": "zzz"}, NotFound),
        ({"adapter": "a@r9"}, NotFound),
        ({"use_case": "zzz"}, NotFound),
        ({"temperature": -1.0}, RequestInvalid),
        ({"top_p": 0.0}, RequestInvalid),
        ({"adapter": {"a": float("nan")}}, RequestInvalid),
        ({"adapter": "a", "use_case": "both"}, RequestInvalid),
        ({"max_tokens": 0}, RequestInvalid),
        ({"beams": 3}, RequestInvalid),
        ({"max_tokens": -1}, RequestInvalid),
    ],
)
def test_errors_arrive_as_the_contracts_own(served, options, error):
    for call in (served.client.generate, served.client.stream):
        with pytest.raises(error):
            call("hello", **options)


def test_a_prompt_longer_than_the_context_is_refused(served):
    with pytest.raises(PromptTooLong):
        served.client.generate("x" * 300, **OPTIONS)


def test_a_message_larger_than_the_bound_is_refused_on_either_side(served):
    with pytest.raises(RemoraError):
        served.client.generate("x" * (5 << 20), **OPTIONS)
    assert served.client.generate("still here", **OPTIONS).text


def test_a_request_id_in_use_is_refused_and_the_running_one_goes_on(served):
    served.engines.gate.clear()
    stream = served.client.stream("hello", request_id="one", **OPTIONS)
    with pytest.raises(Conflict, match="one"):
        served.client.generate("other", request_id="one", **OPTIONS)
    served.engines.gate.set()
    assert "".join(d.text for d in stream) == stream.result.text
    assert stream.result.token_ids == served.solo("hello", 8)


def wait_idle(served) -> None:
    """Until the engine has no row busy and no request waits."""
    pause = threading.Event()
    for _ in range(6000):
        status = served.client.status()
        if status.rows_busy == 0 and status.queued == 0:
            return
        pause.wait(0.01)
    raise AssertionError(served.client.status())


LONG = {**OPTIONS, "max_tokens": 240}


def paced(served) -> None:
    """The engine takes its time, so that a request is still running when the test acts."""
    pause = threading.Event()
    served.engine.before_step = lambda: pause.wait(0.04)


def test_cancel_ends_a_stream_with_what_it_had(served):
    paced(served)
    stream = served.client.stream("hello", request_id="c", **LONG)
    next(stream)
    assert served.client.cancel("c") is True
    rest = "".join(d.text for d in stream)
    assert stream.result.finish_reason is FinishReason.CANCELLED
    assert len(stream.result.token_ids) < 240
    assert stream.result.text.endswith(rest)
    assert served.client.cancel("c") is False


def test_a_caller_that_hangs_up_frees_its_row(served):
    paced(served)
    stream = served.client.stream("hello", **LONG)
    next(stream)
    stream.cancel()
    wait_idle(served)
    assert served.client.status().tokens_generated < 240


def test_a_connection_that_breaks_frees_its_row(served):
    paced(served)
    client = Client(served.address)
    stream = client.stream("hello", **LONG)
    next(stream)
    client.close()
    wait_idle(served)
    assert served.client.status().tokens_generated < 240


def test_the_deadline_of_the_call_ends_the_request(served):
    paced(served)
    with Client(served.address, timeout_s=0.3) as client, pytest.raises(DeadlineExceeded):
        client.generate("hello", **LONG)
    wait_idle(served)
    assert served.client.status().tokens_generated < 240


def test_more_calls_than_rows_are_all_answered_right(served):
    mixes = [{}, {"a": 1.0}, {"b": 1.0}, {"a": 0.5, "b": 2.0}]

    async def main():
        async with AsyncClient(served.address, timeout_s=30) as client:
            return await asyncio.gather(
                *(
                    client.generate(f"hello {i}", adapter=mixes[i % 4] or None, **OPTIONS)
                    for i in range(24)
                )
            )

    for i, result in enumerate(asyncio.run(main())):
        assert result.token_ids == served.solo(f"hello {i}", 8, mixes[i % 4])


def test_a_reader_that_stops_reading_holds_nobody_up(served):
    slow = served.client.stream("slow", **LONG)
    assert served.client.generate("quick", **OPTIONS).token_ids == served.solo("quick", 8)
    wait_idle(served)  # the unread stream has been generated to its end
    list(slow)
    assert slow.result.token_ids == served.solo("slow", 240)


def test_the_async_client_streams_and_cancels(served):
    paced(served)

    async def main():
        async with AsyncClient(served.address) as client:
            async with await client.stream("hello", adapter="a", **OPTIONS) as stream:
                text = "".join([delta.text async for delta in stream])
                assert text == stream.result.text
            assert stream.result.token_ids == served.solo("hello", 8, {"a": 1.0})
            with pytest.raises(NotFound):
                await client.stream("hello", adapter="zzz")
            given_up = await client.stream("hello", **LONG)
            await given_up.__anext__()
            given_up.cancel()
            with pytest.raises(RemoraError, match="cancelled"):
                async for _ in given_up:
                    pass

    asyncio.run(main())
    wait_idle(served)


def test_a_prompt_of_nothing_is_refused_before_it_is_sent(served):
    for prompt in ("", [], (), None):
        with pytest.raises(InvalidInput):
            served.client.generate(prompt)
    with pytest.raises(InvalidInput, match="one of the two"):
        served.client.generate("x", messages=[{"role": "user", "content": "x"}])
