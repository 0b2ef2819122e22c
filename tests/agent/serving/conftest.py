"""A running gRPC server over a model with adapters a and b, and clients for it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from remora_agent.client import Client
from tests.support.serving import ReferenceEngines, World, running_stack


@pytest.fixture
def world(tmp_path) -> World:
    return World(tmp_path)


@pytest.fixture
def engines() -> ReferenceEngines:
    return ReferenceEngines()


@pytest.fixture
def served(tmp_path, world, engines) -> Iterator[SimpleNamespace]:
    """`solo(prompt, count, mix)` are the tokens that a request must get, whatever else runs."""
    with running_stack(tmp_path, engines) as (stack, address):
        stack.host.switch(
            world.assignment(
                adapters=[("a", "r1"), ("b", "r1")], use_cases={"both": {"a": 0.5, "b": 0.25}}
            )
        )
        digests = {n: world.adapter(n).digest for n in "ab"}
        engine = engines.opened[0]

        def solo(text: str, count: int, mix: dict[str, float] | None = None) -> tuple[int, ...]:
            weights = {digests[n]: w for n, w in (mix or {}).items()}
            return engine.solo(client.tokenize(text).ids, count, weights)

        with Client(address, timeout_s=30) as client:
            yield SimpleNamespace(
                stack=stack,
                address=address,
                client=client,
                engine=engine,
                engines=engines,
                digests=digests,
                solo=solo,
            )
