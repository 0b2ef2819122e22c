"""Ten thousand requests, some of them given up at random: nothing is left of them."""

from __future__ import annotations

import asyncio
import os
import random

import psutil
import pytest

from remora_agent.client import AsyncClient
from remora_agent.local_host import HostSettings
from remora_agent.runtime.options import RuntimeOptions
from remora_contract.errors import Cancelled
from tests.support.serving import ReferenceEngines, World, running_stack

IN_FLIGHT = 64
MIXES = (None, "a", "b", {"a": 0.5, "b": 0.25})
LEAKED_BYTES = 32 << 20  # an allocator's unrest; were they kept, they would have twice that
# A full prefix cache is no leak, and takes long to fill.
SETTINGS = HostSettings(RuntimeOptions(prefix_bytes=1 << 20))


async def ask(client: AsyncClient, number: int, cancelled: bool, counts: dict[str, int]) -> None:
    options = {"adapter": MIXES[number % len(MIXES)], "max_tokens": 4 + number % 8}
    prompt = f"request {number} " + "x" * (number % 90)
    if not cancelled:
        await client.generate(prompt, ignore_eos=True, **options)
        counts["answered"] += 1
        return
    stream = await client.stream(prompt, ignore_eos=True, **{**options, "max_tokens": 60})
    try:
        async for _ in stream:
            stream.cancel()
    except Cancelled:
        pass
    counts["cancelled"] += 1


async def crowd(address: str, numbers: range, seed: int) -> dict[str, int]:
    """`numbers` requests, IN_FLIGHT at a time, one in twenty cancelled at its first word."""
    chance, counts = random.Random(seed), {"answered": 0, "cancelled": 0}
    waiting = iter([(number, chance.random() < 0.05) for number in numbers])
    async with AsyncClient(address, timeout_s=120) as client:

        async def worker() -> None:
            for number, cancelled in waiting:
                await ask(client, number, cancelled, counts)

        await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))
    return counts


def leaves_nothing(tmp_path, total: int) -> None:
    me, world = psutil.Process(os.getpid()), World(tmp_path)
    with running_stack(tmp_path, ReferenceEngines(rows=8), host=SETTINGS) as (stack, address):
        stack.host.switch(world.assignment(adapters=[("a", "r1"), ("b", "r1")]))
        warm = total // 4
        asyncio.run(crowd(address, range(warm), 1))
        descriptors, resident = me.num_fds(), me.memory_info().rss
        counts = asyncio.run(crowd(address, range(warm, total), 2))
        assert counts["answered"] + counts["cancelled"] == total - warm
        assert counts["cancelled"] > (total - warm) // 40
        metrics = stack.host.metrics()
        assert metrics["rows_busy"] == metrics["queue_depth"] == metrics["adapter_leases"] == 0
        assert metrics["failures"] == 0
        assert me.num_fds() <= descriptors + 2
        assert me.memory_info().rss - resident < LEAKED_BYTES


def test_a_few_hundred_requests_leave_no_row_lease_socket_or_memory(tmp_path):
    leaves_nothing(tmp_path, 400)


@pytest.mark.slow
def test_ten_thousand_requests_leave_no_row_lease_socket_or_memory(tmp_path):
    leaves_nothing(tmp_path, 10_000)
