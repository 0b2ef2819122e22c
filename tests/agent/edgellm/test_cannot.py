"""What backend edgellm cannot do is refused by name, and docs/edgellm.md lists all of it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import openai
import pytest
from openai import OpenAI

from remora_agent.client import Client
from remora_agent.edgellm.module import installed_version
from remora_agent.edgellm.request import CANNOT, CANNOT_DEFAULT, refuse
from remora_agent.engine.opening import EngineOptions
from remora_agent.hosting.engines import EngineSettings
from remora_agent.runtime.api import StoppingParams
from remora_agent.serving.stack import ServingStack, StackOptions
from remora_contract.errors import EngineFault, Incompatible, Refused, Unsupported
from remora_contract.experiments import Arm, Experiment, Shadow
from remora_contract.gates import GoldenQuestion
from remora_contract.release import SamplingDefaults
from tests.support.adapters import random_tensors, write_sidecar
from tests.support.edgellm import forget_installed
from tests.support.runtime import request

PAGE = Path(__file__).parents[3] / "docs" / "edgellm.md"
CONFORMANCE = Path(__file__).parents[1] / "engine"
ASKED = {
    "min_p": {"min_p": 0.1},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "presence_penalty": {"presence_penalty": 0.5},
    "frequency_penalty": {"frequency_penalty": 0.5},
    "logit_bias": {"logit_bias": {5: 1.0}},
    "seed": {"seed": 1},
    "stop_token_ids": {"stop_token_ids": [5]},
    "ignore_eos": {"ignore_eos": True},
    "min_tokens": {"min_tokens": 1},
    "logprobs": {"logprobs": 0},
    "prompt_logprobs": {"prompt_logprobs": 0},
    "constraint": {"regex": "a+"},
    "priority": {"priority": 1},
    "adapters": {"adapter": {"a": 1.0, "b": 1.0}},
    "weight": {"adapter": {"a": 0.5}},
}


def listed(section: str) -> list[str]:
    """First cells of the table below a heading of the page."""
    text = PAGE.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)


def test_the_page_lists_every_field_that_is_refused():
    assert listed("Fields that are refused") == [limit.field for limit in CANNOT]
    assert [limit.field for limit in CANNOT if limit.field != "tools"] == list(ASKED)


def test_the_page_says_of_every_conformance_suite_what_stands_for_it():
    assert listed("The engines' conformance suite") == sorted(
        p.name for p in CONFORMANCE.glob("test_conformance*.py")
    )


@pytest.mark.parametrize("field", ASKED)
def test_a_field_is_refused_by_name_and_the_next_request_is_answered(served, field):
    served.stack.host.switch(served.world.assignment("two", adapters=[("a", "r1"), ("b", "r1")]))
    with pytest.raises(Unsupported, match=f"^{field}: not with backend edgellm"):
        served.client.generate("x", max_tokens=4, **ASKED[field])
    assert served.client.generate("x", max_tokens=2).text


def test_calls_of_tools_that_special_tokens_mark_are_refused():
    asked = replace(request("one"), stopping=StoppingParams(4), visible_tokens=(7,))
    with pytest.raises(Unsupported, match=r"^tools: not with backend edgellm"):
        refuse(asked)
    refuse(replace(asked, visible_tokens=()))


def test_embeddings_are_refused_on_every_surface(served):
    with pytest.raises(Unsupported, match="embeddings: not with backend edgellm"):
        served.client.embed(["x"])
    url = f"http://{served.stack.openai_address.target()}/v1"
    with (
        OpenAI(base_url=url, api_key="none") as client,
        pytest.raises(openai.APIStatusError, match="embeddings: not with backend edgellm"),
    ):
        client.embeddings.create(model="base", input="x")


@pytest.mark.parametrize("name", CANNOT_DEFAULT)
def test_a_releases_default_that_would_be_ignored_is_refused(stack, world, name):
    value = 2 if name == "min_tokens" else 0.5
    wanted = replace(world.assignment(), sampling=SamplingDefaults(**{name: value}))
    with pytest.raises(Unsupported, match=f"sampling default {name}"):
        stack.host.build(wanted, lambda phase, done: None)


@pytest.mark.parametrize("mix", [{"a": 1.0, "b": 1.0}, {"a": 0.5}])
def test_a_use_case_that_composes_or_weighs_is_refused_before_it_is_opened(stack, world, mix):
    wanted = world.assignment(adapters=[("a", "r1"), ("b", "r1")], use_cases={"uc": mix})
    with pytest.raises(Unsupported, match="use case uc of one: backend edgellm"):
        stack.host.build(wanted, lambda phase, done: None)


def test_a_shadow_is_refused_before_it_is_opened(stack, world):
    arms = (Arm("one", 50.0, adapter="a"), Arm("two", 50.0, adapter="b"))
    experiment = Experiment("e", arms, shadow=Shadow("one", "two", 50.0))
    wanted = world.assignment(adapters=[("a", "r1"), ("b", "r1")])
    with pytest.raises(Unsupported, match=r"experiment e of one: .*shadow"):
        stack.host.build(replace(wanted, experiments=(experiment,)), lambda phase, done: None)


def test_golden_questions_are_asked_by_text_and_others_refused(stack, world):
    wanted = world.assignment(adapters=[("a", "r1")])
    stack.host.switch(wanted)
    scored = GoldenQuestion("q", "perplexity", text="hello")
    with pytest.raises(Unsupported, match="golden question q: backend edgellm answers texts"):
        stack.host.build(replace(wanted, golden=(scored,)), lambda phase, done: None)
    with Client(stack.test_address, timeout_s=60) as client:
        found = client.generate("hello", max_tokens=4, adapter="a")
    right = (
        GoldenQuestion("r", "prefix", text="hello", expected_text=found.text, use_case="a"),
        GoldenQuestion("t", "exact", text="hello", expected_tokens=found.token_ids, use_case="a"),
    )
    stack.host.prove(replace(wanted, golden=right), lambda phase, done: None)
    base = replace(right[1], use_case=None)
    with pytest.raises(EngineFault, match="golden question t: the answer is"):
        stack.host.prove(replace(wanted, golden=(base,)), lambda phase, done: None)
    strange = replace(right[0], use_case="nobody")
    with pytest.raises(Unsupported, match="for nobody, which the release does not have"):
        stack.host.prove(replace(wanted, golden=(strange,)), lambda phase, done: None)
    wrong = GoldenQuestion("q", "prefix", text="hello", expected_text="never", use_case="a")
    with pytest.raises(EngineFault, match="golden question q: the answer is"):
        stack.host.prove(replace(wanted, golden=(wrong,)), lambda phase, done: None)


def test_an_adapter_with_invocation_tokens_is_refused_by_name(stack, world, tmp_path):
    bundle = world.bundle("base")
    tensors = random_tensors(bundle.decoder, seed=1, r=4, projections=("q",))
    write_sidecar(tmp_path / "late", bundle.base_digest, tensors, invocation_tokens=(5,))
    stack.host.switch(world.assignment())
    model = stack.host._serving.model
    with pytest.raises(Unsupported, match=r"adapter late: .*invocation tokens"):
        model.runtime.adapters.register("late", "r1", tmp_path / "late")


def test_without_the_wheel_the_error_says_what_to_install(tmp_path):
    forget_installed()
    if installed_version() is not None:
        pytest.skip("tensorrt-edgellm is installed here")
    options = EngineOptions(backend="edgellm")
    with pytest.raises(Unsupported, match=r"pip install tensorrt-edgellm.*no aarch64 wheel"):
        ServingStack(StackOptions(engines=EngineSettings(tmp_path, options=options)))


def test_a_context_of_the_agent_is_refused(tmp_path, wheel):
    options = EngineOptions(backend="edgellm", context=64)
    with pytest.raises(Refused, match="context: an engine of TensorRT Edge-LLM has its own"):
        ServingStack(StackOptions(engines=EngineSettings(tmp_path, options=options)))


def test_a_bundle_of_a_graph_is_refused(stack, tmp_path, wheel):
    from tests.support.serving import World

    plain = World(tmp_path / "plain").assignment()
    with pytest.raises(Incompatible, match=r"dialect: needs .*onnxruntime"):
        stack.host.build(plain, lambda phase, done: None)
