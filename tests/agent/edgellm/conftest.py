"""A stack with backend edgellm over the emulated wheel."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from remora_agent.client import Client
from remora_agent.engine.opening import EngineOptions
from remora_agent.hosting.engines import EngineSettings
from remora_agent.local_host import HostSettings
from remora_agent.serving.address import parse_address
from remora_agent.serving.openai.settings import openai_options
from remora_agent.serving.stack import ServingStack, StackOptions
from tests.support.edgellm import EdgeWorld, forget_installed, install_wheel


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Iterator[None]:
    install_wheel(tmp_path / "site", monkeypatch)
    yield
    forget_installed()


@pytest.fixture
def world(tmp_path, wheel) -> EdgeWorld:
    return EdgeWorld(tmp_path)


@pytest.fixture
def stack(tmp_path, wheel) -> Iterator[ServingStack]:
    stack = ServingStack(
        StackOptions(
            listen=parse_address("127.0.0.1:0"),
            engines=EngineSettings(
                cache_dir=tmp_path / "engines", options=EngineOptions(backend="edgellm")
            ),
            host=HostSettings(idle_s=20.0),
            openai=openai_options("127.0.0.1:0", None, None, None),
        )
    )
    address = stack.start().target()
    stack.test_address = address
    yield stack
    stack.stop(5.0)


@pytest.fixture
def served(stack, world) -> Iterator[SimpleNamespace]:
    """Adapter a serves, and use case uc on it."""
    stack.host.switch(world.assignment(adapters=[("a", "r1")], use_cases={"uc": {"a": 1.0}}))
    with Client(stack.test_address, timeout_s=60) as client:
        yield SimpleNamespace(stack=stack, client=client, world=world)
