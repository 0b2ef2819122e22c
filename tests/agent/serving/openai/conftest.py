"""A running stack with the HTTP surface on, and the openai client for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest

from remora_agent.serving.address import TcpAddress
from remora_agent.serving.openai.keys import ApiKeys
from remora_agent.serving.openai.settings import OpenAiOptions
from tests.support.scripted_engine import ScriptedEngines
from tests.support.serving import ReferenceEngines, World, running_stack, write_bundle

LOOPBACK = TcpAddress("127.0.0.1", 0)
# Shaped as Qwen's: what a chat with tools looks like to a model.
HERMES = (
    "{% if tools %}s:{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "Answer with <tool_call></tool_call>.\n{% endif %}"
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "</tool_call>{% endfor %}"
    "{% if m.tool_call_id %}({{ m.tool_call_id }}){% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def http(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """Shared by a module's tests: they leave it as they find it."""
    with serving(tmp_path_factory.mktemp("http")) as served:
        yield served


@pytest.fixture
def own_http(tmp_path) -> Iterator[SimpleNamespace]:
    """Of one test alone."""
    with serving(tmp_path) as served:
        yield served


@contextmanager
def serving(tmp_path: Path, keys: ApiKeys | None = None) -> Iterator[SimpleNamespace]:
    """Base model `base` with adapters a and b and the use case both."""
    world, engines = World(tmp_path, context=512), ReferenceEngines()
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    options = OpenAiOptions(LOOPBACK, keys=keys or ApiKeys(), adapter_directory=adapters)
    with running_stack(tmp_path, engines, openai=options) as (stack, address):
        stack.host.switch(
            world.assignment(
                adapters=[("a", "r1"), ("b", "r1")], use_cases={"both": {"a": 0.5, "b": 0.25}}
            )
        )
        url = f"http://{stack.openai_address.target()}"
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
            httpx.Client(base_url=url, timeout=30) as raw,
        ):
            yield SimpleNamespace(
                stack=stack,
                grpc=address,
                url=url,
                client=client,
                raw=raw,
                engines=engines,
                engine=engines.opened[0],
                adapters=adapters,
                world=world,
                digests={n: world.adapter(n).digest for n in "ab"},
            )


@pytest.fixture(scope="module")
def scripted(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """The same with a model that says what `says` told it to."""
    tmp_path = tmp_path_factory.mktemp("scripted")
    world, engines = World(tmp_path, context=512), ScriptedEngines()
    world.bundles["hermes"] = write_bundle(tmp_path / "b" / "hermes", "hermes", 2048, HERMES)
    with running_stack(tmp_path, engines, openai=OpenAiOptions(LOOPBACK)) as (stack, address):
        stack.host.switch(world.assignment(bundle="hermes"))
        url = f"http://{stack.openai_address.target()}"
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            yield SimpleNamespace(
                client=client, url=url, grpc=address, says=engines.says, stack=stack
            )


@pytest.fixture
def scripted_noise(tmp_path) -> Iterator[SimpleNamespace]:
    """A model with tools in its template that says anything at all."""
    world, engines = World(tmp_path), ReferenceEngines()
    world.bundles["hermes"] = write_bundle(tmp_path / "b" / "hermes", "hermes", 2048, HERMES)
    with running_stack(tmp_path, engines, openai=OpenAiOptions(LOOPBACK)) as (stack, address):
        stack.host.switch(world.assignment(bundle="hermes"))
        url = f"http://{stack.openai_address.target()}"
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            yield SimpleNamespace(client=client, url=url, grpc=address, stack=stack)
