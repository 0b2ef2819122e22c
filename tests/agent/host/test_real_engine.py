"""Switches under load on the real engine: adapters, then a bundle of another precision."""

from __future__ import annotations

import pytest

from remora_agent.client import Client
from remora_agent.engine.opening import EngineOptions
from remora_agent.hosting.engines import CachedEngines, EngineSettings
from remora_agent.serving.address import TcpAddress
from remora_agent.serving.stack import ServingStack, StackOptions
from remora_contract.errors import ArtifactInvalid, EngineFault
from tests.agent.host.load import OPTIONS, Load


@pytest.fixture
def real(real_bundles):
    settings = EngineSettings(
        cache_dir=real_bundles.cache, options=EngineOptions(rows=4, threads=1)
    )
    stack = ServingStack(
        StackOptions(TcpAddress("127.0.0.1", 0), engines=settings), engines=CachedEngines(settings)
    )
    address = stack.start().target()
    yield stack.host, address
    stack.stop(5.0)


def quiet(phase: str, done: float) -> None:
    """Nobody watches."""


def test_every_request_is_answered_by_exactly_one_release(real, real_bundles):
    host, address = real
    releases = [
        real_bundles.assignment("1", real_bundles.plain, "r1"),
        real_bundles.assignment("2", real_bundles.plain, "r2"),
        real_bundles.assignment("3", real_bundles.int4, "r2"),
        real_bundles.assignment("4", real_bundles.plain, "r1"),
    ]
    host.prove(releases[2], quiet)  # builds it too, in children
    host.switch(releases[0])
    choices = [{"adapter": "a"}, {"adapter": {"a": 0.5, "b": 0.5}}, {"adapter": None}]
    with Load(address, choices, clients=3) as load:
        for release in releases[1:]:
            host.switch(release)
            load.wait_answers(6)
    assert not load.failures
    known = {(r.bundle_digest, frozenset(a.digest for a in r.adapters)) for r in releases}
    seen = set()
    for _, _, result in load.answers:
        used = {a.digest for a in result.provenance.adapters}
        matching = [k for k in known if k[0] == result.provenance.bundle_digest and used <= k[1]]
        assert matching, result.provenance
        if used:
            assert len(matching) == 1
            seen.add(matching[0])
    assert seen == known


def test_swapping_back_answers_as_before(real, real_bundles):
    host, address = real
    first = real_bundles.assignment("1", real_bundles.plain, "r1")
    second = real_bundles.assignment("2", real_bundles.plain, "r2")
    answers = []
    with Client(address, timeout_s=30) as client:
        for release in (first, second, first):
            host.switch(release)
            answers.append(client.generate("hello", adapter="a", **OPTIONS).token_ids)
    assert answers[0] == answers[2] != answers[1]


def test_golden_prompts_that_do_not_fit_the_graph_are_not_proven(real, real_bundles, tmp_path):
    host, _ = real
    release = real_bundles.assignment("1", real_bundles.plain, "r1")
    golden = real_bundles.plain / "golden.json"
    text = golden.read_text()
    try:
        golden.write_text(text.replace('"expected":[', '"expected":[9,', 1))
        with pytest.raises((ArtifactInvalid, EngineFault)):
            host.prove(release, quiet)
    finally:
        golden.write_text(text)
