"""A host on reference engines behind a real gRPC server."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from remora_agent.client import Client, Result
from remora_agent.local_host import HostSettings
from tests.agent.host.load import TOKENS, Load
from tests.support.reference_engine import ReferenceEngine
from tests.support.serving import ReferenceEngines, World, running_stack


@pytest.fixture
def hosted(tmp_path) -> Iterator[SimpleNamespace]:
    world, engines = World(tmp_path), ReferenceEngines()
    judge = ReferenceEngine(1, 256, 258, 64)

    def solo(prompt: str, result: Result) -> tuple[int, ...]:
        mix = {a.digest: a.weight for a in result.provenance.adapters}
        return judge.solo(ids(prompt), TOKENS, mix)

    settings = HostSettings(idle_s=20.0)
    with running_stack(tmp_path, engines, host=settings) as (stack, address):

        def ids(prompt: str) -> tuple[int, ...]:
            return client.tokenize(prompt).ids

        with Client(address, timeout_s=30) as client:
            yield SimpleNamespace(
                world=world,
                engines=engines,
                stack=stack,
                host=stack.host,
                address=address,
                client=client,
                solo=solo,
                load=lambda *choices, clients=4: Load(address, list(choices), clients),
            )
