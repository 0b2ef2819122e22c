"""Priority, client, salt and refusals as a caller of the gRPC surface meets them."""

import threading

import pytest

from remora_agent.local_host import HostSettings
from remora_agent.runtime.options import RuntimeOptions
from remora_contract.errors import Exhausted, RequestInvalid
from tests.support.serving import ReferenceEngines, World, running_stack

OPTIONS = {"max_tokens": 4, "ignore_eos": True}
SYSTEM = "s" * 100  # a byte a token


def test_a_repeated_beginning_is_told_as_cached_and_a_salt_keeps_it_apart(served):
    client = served.client
    first = client.generate(SYSTEM + "one", **OPTIONS)
    again = client.generate(SYSTEM + "two", **OPTIONS)
    salted = client.generate(SYSTEM + "two", cache_salt="tenant", **OPTIONS)
    assert [r.usage.cached_tokens for r in (first, again, salted)] == [0, 96, 0]
    assert again.token_ids == salted.token_ids == served.solo(SYSTEM + "two", 4)


def test_higher_priority_is_answered_first(tmp_path):
    from remora_agent.client import Client

    world, engines = World(tmp_path), ReferenceEngines(rows=1)
    with (
        running_stack(tmp_path, engines) as (stack, address),
        Client(address, timeout_s=30) as client,
    ):
        stack.host.switch(world.assignment("one"))
        engines.gate.clear()

        def call(prompt, priority):
            client.generate(prompt, priority=priority, **OPTIONS)

        pause = threading.Event()
        threads = []
        for queued, priority in enumerate([0, -1, 0, 1]):
            prompt = "x" * (queued + 1)
            threads.append(threading.Thread(target=call, args=(prompt, priority)))
            threads[-1].start()
            while client.status().rows_busy + client.status().queued <= queued:
                pause.wait(0.005)
        engines.gate.set()
        for thread in threads:
            thread.join(20)
        read = [tokens for _, _, tokens in engines.opened[0].calls.prefills]
        assert read[1:] == [1, 4, 3, 2]  # after the probe


def test_values_out_of_range_are_refused_by_name(served):
    for options in ({"priority": 101}, {"client": "a\nb"}, {"cache_salt": "x" * 257}):
        with pytest.raises(RequestInvalid, match=next(iter(options))):
            served.client.generate("x", **options)


@pytest.mark.parametrize("free", [0, (256 << 20) + 100])
def test_without_memory_a_request_is_told_when_to_come_back(tmp_path, free):
    from remora_agent.client import Client

    world, engines = World(tmp_path), ReferenceEngines()
    with (
        running_stack(tmp_path, engines) as (stack, address),
        Client(address, timeout_s=30) as client,
    ):
        stack.host._available_bytes = lambda: free
        stack.host.switch(world.assignment("one"))
        with pytest.raises(Exhausted, match="memory") as caught:
            client.generate("x", **OPTIONS)
        assert caught.value.retry_after_s > 0


def test_a_full_queue_says_when_to_come_back(tmp_path):
    from remora_agent.client import Client

    world, engines = World(tmp_path), ReferenceEngines(rows=1)
    host = HostSettings(RuntimeOptions(max_waiting=1))
    with (
        running_stack(tmp_path, engines, host=host) as (stack, address),
        Client(address, timeout_s=30) as client,
    ):
        stack.host.switch(world.assignment("one"))
        engines.gate.clear()
        calls = [threading.Thread(target=lambda: client.generate("x", **OPTIONS)) for _ in range(2)]
        pause = threading.Event()
        for i, thread in enumerate(calls):
            thread.start()
            while client.status().rows_busy + client.status().queued <= i:
                pause.wait(0.005)
        with pytest.raises(Exhausted, match="1 requests are waiting") as caught:
            client.generate("x", **OPTIONS)
        assert caught.value.retry_after_s > 0
        engines.gate.set()
        for thread in calls:
            thread.join(20)
