"""A fleet of TensorRT Edge-LLM's engines (its wheel an emulator): join, release, roll out, switch
adapters, ask. The commands are those a user types.
"""

from __future__ import annotations

import os

import openai
import pytest

import examples.demo.fleet
from examples.demo.processes import DemoFailed
from remora_contract.bundle import load_bundle
from tests.end_to_end import stage as stages
from tests.support.edgellm import write_engine, write_wheel

pytestmark = pytest.mark.slow
BUNDLE = "bundles/edge"


@pytest.fixture
def edge_stage(tmp_path, artifacts, monkeypatch):
    """Agents with backend edgellm, and a bundle `edge` in the repository."""
    site = write_wheel(tmp_path / "site")
    paths = os.pathsep.join([str(site), stages.ENVIRONMENT["PYTHONPATH"]])
    monkeypatch.setitem(stages.ENVIRONMENT, "PYTHONPATH", paths)
    plain = examples.demo.fleet.agent_toml

    def toml(*arguments, **more):
        lines = plain(*arguments, **more).splitlines()
        kept = [line for line in lines if not line.startswith("threads")]
        at = kept.index("[serving]") + 1
        kept[at:at] = ['backend = "edgellm"']
        return "\n".join([*kept, "[openai]", 'listen = "127.0.0.1:0"', ""])

    monkeypatch.setattr(examples.demo.fleet, "agent_toml", toml)
    checkpoint = artifacts.folder / "checkpoint"
    with stages.open_stage(tmp_path, artifacts) as opened:
        write_engine(tmp_path / "engine", checkpoint / "tokenizer.json", 512)
        opened.shop.run(
            *("remora-build", "edgellm", "engine", BUNDLE, "--checkpoint", str(checkpoint)),
            *("--edgellm-version", "0.11.0", "--sm", "87"),
        )
        opened.shop.run(
            *("remora-build", "publish", BUNDLE, stages.REPOSITORY),
            *("--name", "edge", "--revision", "1"),
        )
        yield opened


def test_a_fleet_of_edge_llm_engines_is_rolled_out_and_asked(edge_stage):
    (agent,) = edge_stage.join("one")
    edge_stage.release("first", "edge@1", "alpha")
    edge_stage.roll_out("first")
    digest = load_bundle(edge_stage.shop.folder / BUNDLE).digest
    digests = edge_stage.artifacts.built.digests()
    with agent.client() as client:
        base = client.generate("one two", max_tokens=5)
        alpha = client.generate("one two", max_tokens=5, adapter="alpha")
    assert base.provenance.bundle_digest == digest
    assert alpha.provenance.adapters[0].digest == digests["alpha"]
    assert alpha.text != base.text

    edge_stage.release("second", "edge@1", "alpha", "beta-1", use_case="both=beta:1")
    edge_stage.roll_out("second")
    edge_stage.release("third", "edge@1", "alpha", "beta-2")
    edge_stage.roll_out("third")
    with agent.client() as client:
        beta = client.generate("one two", max_tokens=5, adapter="beta")
        assert beta.provenance.adapters[0].digest == digests["beta-2"]
        assert client.generate("one two", max_tokens=5).text == base.text
        assert client.status().backend == "edgellm 0.11.0"
    (address,) = {e["address"] for e in agent.events("http.listening")}
    with openai.OpenAI(base_url=f"http://{address}/v1", api_key="none") as client:
        told = client.completions.create(model="beta", prompt="one two", max_tokens=5)
    assert told.choices[0].text == beta.text


def test_a_composition_is_refused_by_the_device_and_the_release_before_goes_on(edge_stage):
    (agent,) = edge_stage.join("one")
    edge_stage.release("first", "edge@1", "alpha")
    edge_stage.roll_out("first")
    edge_stage.release("mixed", "edge@1", "alpha", "beta-1", use_case="both=alpha:1,beta:1")
    found = edge_stage.ended(edge_stage.start("mixed"))
    assert found["state"] != "COMPLETED"
    assert "one adapter at a time" in str(found)
    assert edge_stage.running() == {"first"}
    with agent.client() as client:
        assert client.generate("one two", max_tokens=2, adapter="alpha").text


def test_a_device_with_another_backend_refuses_the_bundle(edge_stage, monkeypatch):
    monkeypatch.undo()
    edge_stage.join("one")
    edge_stage.release("first", "edge@1")
    found = edge_stage.ended(edge_stage.start("first"))
    assert found["state"] != "COMPLETED"
    assert "edgellm >= 0.11" in str(found)
    with pytest.raises(DemoFailed):
        edge_stage.shop.run("remora-agent", "build", BUNDLE)
