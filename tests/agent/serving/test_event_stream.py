"""Events between a step thread and a slow reader."""

from __future__ import annotations

import asyncio
import threading

import pytest

from remora_agent.runtime.api import (
    Accepted,
    Delta,
    Failed,
    Finished,
    FinishReason,
    Provenance,
    Timings,
    TokenLogprob,
    Usage,
)
from remora_agent.serving import wire
from remora_agent.serving.event_stream import JOINED_TOKENS, EventStream
from remora_agent.serving.limits import MAX_MESSAGE_BYTES
from remora_contract.errors import EngineFault

PROVENANCE = Provenance("b", "e")
END = Finished(FinishReason.STOP, Usage(1, 0, 2), Timings(0, 0, 0, 0), PROVENANCE)


async def drained(stream: EventStream) -> list[object]:
    return [event async for event in stream.events()]


def test_what_nobody_has_read_yet_is_joined_into_one_delta():
    async def main() -> list[object]:
        stream = EventStream(asyncio.get_running_loop())
        stream.put(Accepted("r", PROVENANCE))
        for i in range(1000):
            stream.put(Delta("ä", (i,)))
        stream.put(END)
        return await drained(stream)

    events = asyncio.run(main())
    assert events == [Accepted("r", PROVENANCE), Delta("ä" * 1000, tuple(range(1000))), END]


def test_what_is_joined_fits_a_message_with_all_its_scores():
    count = 3 * JOINED_TOKENS + 5
    ranked = tuple((1 << 20, -1.0) for _ in range(20))

    async def main() -> list[object]:
        stream = EventStream(asyncio.get_running_loop())
        for i in range(count):
            stream.put(Delta("word", (i,), (TokenLogprob(1 << 20, -1.0, ranked),)))
        stream.put(END)
        return await drained(stream)

    *deltas, end = asyncio.run(main())
    assert end == END
    assert [i for d in deltas for i in d.token_ids] == list(range(count))
    assert [len(d.token_ids) for d in deltas] == [JOINED_TOKENS] * 3 + [5]
    assert all(wire.event(d, 0).ByteSize() < MAX_MESSAGE_BYTES / 2 for d in deltas)


def test_nothing_is_lost_between_a_thread_and_a_reader_that_keep_different_pace():
    async def main() -> list[object]:
        stream = EventStream(asyncio.get_running_loop())

        def produce() -> None:
            stream.put(Accepted("r", PROVENANCE))
            for i in range(5000):
                stream.put(Delta(chr(97 + i % 26), (i,)))
            stream.put(END)

        thread = threading.Thread(target=produce)
        thread.start()
        events = await drained(stream)
        thread.join()
        return events

    first, *deltas, last = asyncio.run(main())
    assert first == Accepted("r", PROVENANCE)
    assert last == END
    assert [i for d in deltas for i in d.token_ids] == list(range(5000))
    assert "".join(d.text for d in deltas) == "".join(chr(97 + i % 26) for i in range(5000))


def test_tokens_without_text_are_not_held_back():
    async def main() -> list[object]:
        stream = EventStream(asyncio.get_running_loop())
        stream.put(Delta("", (7,)))
        stream.put(END)
        return await drained(stream)

    assert asyncio.run(main()) == [Delta("", (7,)), END]


def test_a_failure_is_raised_after_the_text_before_it():
    seen: list[object] = []

    async def main() -> None:
        stream = EventStream(asyncio.get_running_loop())
        stream.put(Delta("x", (1,)))
        stream.put(Failed(EngineFault("it broke")))
        stream.put(Delta("late", (2,)))
        async for event in stream.events():
            seen.append(event)  # noqa: PERF401 (what came before the failure is wanted)

    with pytest.raises(EngineFault, match="it broke"):
        asyncio.run(main())
    assert seen == [Delta("x", (1,))]


def test_the_step_thread_survives_a_loop_that_is_gone():
    loop = asyncio.new_event_loop()
    stream = EventStream(loop)
    loop.close()
    stream.put(Delta("x", (1,)))
