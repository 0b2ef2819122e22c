"""ModelStreamInfer: streams of many requests, driven by the unchanged tritonclient."""

from __future__ import annotations

import asyncio
import threading

import pytest
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from tests.support.triton import OPTIONS, inputs, is_final, outputs, streaming, text_of

LONG = {"max_tokens": 240}


def joined(results) -> str:
    return "".join(text_of(r) for r in results)


def wait_idle(served) -> None:
    """Until the engine has no row busy and no request waits."""
    pause = threading.Event()
    for _ in range(6000):
        status = served.client.status()
        if status.rows_busy == 0 and status.queued == 0:
            return
        pause.wait(0.01)
    raise AssertionError(served.client.status())


def paced(served) -> None:
    """The engine takes its time, so that a request is still running when the test acts."""
    pause = threading.Event()
    served.engine.before_step = lambda: pause.wait(0.04)


def test_a_stream_gives_the_answer_piece_by_piece_and_its_counts_at_the_end(served, triton, text):
    paced(served)
    with streaming(triton) as stream:
        stream.send("base", "hello", request_id="mine", adapter="a")
        results = stream.all()
    assert joined(results) == text("hello", 8, {"a": 1.0})
    assert len(results) > 2
    assert {r.get_response().id for r in results} == {"mine"}
    assert [is_final(r) for r in results] == [False] * (len(results) - 1) + [True]
    assert sum(int(r.as_numpy("num_output_tokens")[0]) for r in results) == 8
    last = results[-1]
    assert last.as_numpy("num_input_tokens").tolist() == [5]
    assert last.as_numpy("finish_reason")[0] == b"length"
    assert last.as_numpy("adapter_digests")[0].decode() == served.digests["a"]
    assert results[0].as_numpy("finish_reason") is None


def test_without_stream_there_is_one_response_with_everything(served, triton, text):
    with streaming(triton) as stream:
        stream.send("base", "hello", stream=None)
        (only,) = stream.all()
    assert text_of(only) == text("hello")
    assert only.as_numpy("num_output_tokens").tolist() == [8]


@pytest.mark.parametrize("piecewise", [True, False])
def test_an_empty_final_response_comes_last_when_it_is_asked_for(served, triton, text, piecewise):
    with streaming(triton) as stream:
        stream.send("base", "hello", stream=piecewise, enable_empty_final_response=True)
        *results, empty = stream.all()
    assert joined(results) == text("hello")
    assert results[-1].as_numpy("finish_reason")[0] == b"length"
    assert (len(empty.get_response().outputs), is_final(empty)) == (0, True)


def test_an_error_ends_its_request_and_the_stream_goes_on(served, triton, text):
    with streaming(triton) as stream:
        stream.send("zzz", "hello", request_id="bad")
        with pytest.raises(InferenceServerException, match="NOT_FOUND: no model is named 'zzz'"):
            stream.next()
        stream.send("base", "hello", temperature=-1.0)
        with pytest.raises(InferenceServerException, match=r"INVALID_ARGUMENT.*temperature"):
            stream.next()
        stream.send("base", "hello", outputs=outputs("context_logits"))
        with pytest.raises(InferenceServerException, match=r"UNIMPLEMENTED.*context_logits"):
            stream.next()
        stream.send("base", "hello")
        assert joined(stream.all()) == text("hello")


def test_an_error_says_in_band_whose_it_is(served, triton):
    stub = triton._client_stub
    request = triton_request("zzz", "mine")
    (response,) = stub.ModelStreamInfer(iter([request]))
    assert response.error_message
    assert response.infer_response.id == "mine"
    assert response.infer_response.parameters["triton_final_response"].bool_param


def triton_request(model: str, request_id: str, **options):
    from tritonclient.grpc._utils import _get_inference_request

    given = inputs("hello", **{"stream": True, **options})
    return _get_inference_request(
        model, given, "", request_id, None, 0, False, False, 0, None, None
    )


def test_requests_of_one_stream_are_answered_side_by_side(served, triton, text):
    mixes = [{}, {"a": 1.0}, {"b": 1.0}, {"a": 0.5, "b": 2.0}]
    with streaming(triton) as stream:
        for i in range(16):
            mix = mixes[i % 4]
            chosen = {"adapter": list(mix), "adapter_weight": list(mix.values())} if mix else {}
            stream.send("base", f"hello {i}", request_id=str(i), **chosen)
        answers = stream.by_id(16)
    for i in range(16):
        assert joined(answers[str(i)]) == text(f"hello {i}", 8, mixes[i % 4])


def test_a_short_request_overtakes_a_long_one_on_the_same_stream(served, triton):
    paced(served)
    with streaming(triton) as stream:
        stream.send("base", "long", request_id="long", **LONG)
        stream.next()
        stream.send("base", "short", request_id="short", max_tokens=2)
        ended = next(r for r in iter(stream.next, None) if is_final(r))
        assert ended.get_response().id == "short"


def test_a_cancelled_stream_frees_its_rows(served, triton):
    paced(served)
    with streaming(triton) as stream:
        for _ in range(3):
            stream.send("base", "hello", **LONG)
        stream.next()
    wait_idle(served)
    assert served.client.status().tokens_generated < 3 * 240


def test_a_connection_that_breaks_frees_its_rows(served):
    paced(served)
    client = InferenceServerClient(served.address)
    with streaming(client) as stream:
        stream.send("base", "hello", **LONG)
        stream.next()
        client._channel.close()  # `close` would wait for the answer
        wait_idle(served)
        assert served.client.status().tokens_generated < 240


def test_a_deadline_of_the_stream_ends_it(served, triton):
    paced(served)
    with streaming(triton, stream_timeout=0.5) as stream:
        stream.send("base", "hello", **LONG)
        with pytest.raises(InferenceServerException):
            for _ in range(240):
                stream.next()
    wait_idle(served)
    assert served.client.status().tokens_generated < 240


def test_a_request_that_another_hand_cancels_ends_in_band(served, triton):
    paced(served)
    with streaming(triton) as stream:
        stream.send("base", "hello", adapter="a", **LONG)
        stream.next()
        served.client.unload_adapter("a", mode="cancel")
        with pytest.raises(InferenceServerException, match="CANCELLED"):
            for _ in range(240):
                stream.next()
        stream.send("base", "hello")
        assert is_final(stream.all()[-1])


def test_a_client_that_stops_reading_holds_nobody_up(served, triton, text):
    release = threading.Event()
    slow = InferenceServerClient(served.address)
    slow.start_stream(lambda result, error: release.wait(30))
    try:
        for i in range(8):
            slow.async_stream_infer("base", inputs(f"slow {i}", stream=True, **LONG))
        with streaming(triton) as stream:
            stream.send("base", "quick")
            assert joined(stream.all()) == text("quick")
        wait_idle(served)  # the unread streams have been generated to their ends
    finally:
        release.set()
        slow.stop_stream(cancel_requests=True)
        slow.close()


def test_the_async_client_streams_and_cancels(served, text):
    paced(served)

    async def requests(count: int, **options):
        for i in range(count):
            given = inputs(f"hello {i}", **{"stream": True, **options})
            yield {"model_name": "base:b", "inputs": given, "request_id": str(i)}

    async def main():
        async with triton_aio.InferenceServerClient(served.address) as client:
            whole = await client.infer("base", inputs("hello"))
            assert text_of(whole) == text("hello")
            texts: dict[str, str] = {}
            async for result, error in client.stream_infer(requests(4)):
                assert error is None
                name = result.get_response().id
                texts[name] = texts.get(name, "") + text_of(result)
            assert texts == {str(i): text(f"hello {i}", 8, {"b": 1.0}) for i in range(4)}
            long = client.stream_infer(requests(2, **LONG))
            await long.__anext__()
            assert long.cancel()

    asyncio.run(main())
    wait_idle(served)


@pytest.mark.slow
def test_two_hundred_requests_at_a_time_of_sixteen_are_all_answered_right(served, text):
    mixes = [{}, {"a": 1.0}, {"b": 1.0}, {"a": 0.5, "b": 0.25}]
    models = ["base", "base:a", "ensemble:b", "base:both"]

    async def one(client, places, i):
        async with places:
            if i % 2:
                result = await client.infer(models[i % 4], inputs(f"hello {i}"))
                return text_of(result)
            pieces = []

            async def single():
                given = inputs(f"hello {i}", stream=True)
                yield {"model_name": models[i % 4], "inputs": given}

            async for result, error in client.stream_infer(single()):
                assert error is None
                pieces.append(text_of(result))
            return "".join(pieces)

    async def main():
        places = asyncio.Semaphore(16)
        async with triton_aio.InferenceServerClient(served.address) as client:
            return await asyncio.gather(*(one(client, places, i) for i in range(200)))

    answers = asyncio.run(main())
    for i, answer in enumerate(answers):
        assert answer == text(f"hello {i}", OPTIONS["max_tokens"], mixes[i % 4])
    assert served.client.status().requests_failed == 0
    wait_idle(served)
