"""Use cases over gRPC: composed by name, weighted anew by a request, counted by name."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import pytest

from remora_agent.client import AsyncClient, Client, UseCase, UseCaseCounts
from remora_agent.serving import wire
from remora_agent.serving.call import UseCaseRef
from remora_agent.telemetry.serving import serving_metrics
from remora_contract.errors import (
    DocumentInvalid,
    EngineFault,
    NotFound,
    PromptTooLong,
    RequestInvalid,
    Unsupported,
)
from remora_contract.release import ReleaseUseCase, WeightedName
from remora_protos.inference.v1 import inference_pb2 as pb
from tests.support.reference_engine import fault

OPTIONS = {"max_tokens": 6, "ignore_eos": True, "temperature": 0.0}


def weights_of(result) -> dict[str, float]:
    return {a.name: a.weight for a in result.provenance.adapters}


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        ({}, {"a": 0.5, "b": 0.25}),
        ({"b": 1.5}, {"a": 0.5, "b": 1.5}),
        ({"a": -2.0, "b": 0.0}, {"a": -2.0, "b": 0.0}),
    ],
)
def test_a_request_may_weigh_a_use_cases_adapters_anew(served, weights, wanted):
    result = served.client.generate("hello", use_case="both", weights=weights, **OPTIONS)
    assert result.token_ids == served.solo("hello", 6, wanted)
    assert weights_of(result) == wanted
    # The use case itself is what it was.
    assert served.client.use_cases() == (UseCase("both", {"a": 0.5, "b": 0.25}),)


def arrived(status) -> int:
    return status.rows_busy + status.queued


def test_rows_of_one_batch_have_each_their_own_weights(served):
    """Four at a time, as many as the engine has rows: no step begins before all have arrived."""
    served.engines.gate.clear()
    given = [{"a": 0.1 * i, "b": 1.0 - 0.2 * i} for i in range(12)]

    async def all_of_them() -> list:
        async with AsyncClient(served.address, timeout_s=60) as client:
            calls = [client.generate("hello", use_case="both", weights=w, **OPTIONS) for w in given]
            tasks = [asyncio.ensure_future(call) for call in calls]
            while arrived(await client.status()) < len(tasks):
                await asyncio.sleep(0.01)
            served.engines.gate.set()
            return await asyncio.gather(*tasks)

    results = asyncio.run(all_of_them())
    assert max(len(rows) for rows in served.engine.calls.decodes) == 4
    for result, weights in zip(results, given, strict=True):
        rounded = {n: pb.WeightedAdapter(weight=w).weight for n, w in weights.items()}
        assert weights_of(result) == rounded
        assert result.token_ids == served.solo("hello", 6, rounded)


def test_a_streams_weights_are_those_of_the_request(served):
    with served.client.stream("hello", use_case="both", weights={"a": 3.0}, **OPTIONS) as stream:
        tokens = [t for delta in stream for t in delta.token_ids]
    assert tuple(tokens) == served.solo("hello", 6, {"a": 3.0, "b": 0.25})


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"weights": {"c": 1.0}}, RequestInvalid, "use case both has a, b, not c"),
        ({"weights": {"a": math.nan}}, RequestInvalid, "weight of a must be a number"),
        ({"weights": {"a": math.inf}}, RequestInvalid, "weight of a must be a number"),
        ({"weights": {"a": -100.5}}, RequestInvalid, "weight of a must be a number"),
        ({"weights": {"a@r1": 1.0}}, DocumentInvalid, "adapter name 'a@r1'"),
        ({"weights": {f"a{i}": 1.0 for i in range(9)}}, RequestInvalid, "at most 8"),
        ({"use_case": "zzz", "weights": {"a": 1.0}}, NotFound, "zzz"),
        ({"use_case": None, "weights": {"a": 1.0}}, RequestInvalid, "go with use_case"),
        ({"use_case": None, "adapter": "a", "weights": {"a": 1.0}}, RequestInvalid, "use_case"),
    ],
)
def test_weights_that_mean_nothing_are_refused(served, options, error, said):
    with pytest.raises(error, match=said):
        served.client.generate("hello", **{"use_case": "both", **options}, **OPTIONS)
    assert served.client.use_case_counts() == ()


def request(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="hi", **fields)


def test_the_wire_carries_weights_in_order_and_refuses_what_they_cannot_say():
    given = [pb.WeightedAdapter(name=n, weight=w) for n, w in (("b", 0.5), ("a", 0.0))]
    call = wire.generate_call(request(use_case="u+v", use_case_weights=given))
    wanted = (WeightedName("b", 0.5), WeightedName("a", 0.0))
    assert call.selection == UseCaseRef("u+v", wanted)
    for adapters, said in (
        ([pb.WeightedAdapter(name="a")], "give 'a' a weight"),
        ([pb.WeightedAdapter(name="a", weight=1, revision="r1")], "leave the revision out"),
        ([given[0], given[0]], "listed twice"),
    ):
        with pytest.raises(RequestInvalid, match=said):
            wire.generate_call(request(use_case="u", use_case_weights=adapters))
    with pytest.raises(RequestInvalid, match="they go with use_case"):
        wire.generate_call(request(none=pb.NoAdapter(), use_case_weights=given))


def test_an_agent_of_before_would_refuse_the_field_and_not_ignore_it():
    """It is a field of its own, so what does not know it sees an unknown one."""
    given = request(use_case="u", use_case_weights=[pb.WeightedAdapter(name="a", weight=1)])
    assert pb.GenerateRequest.DESCRIPTOR.fields_by_name["use_case_weights"].number == 10
    unknown = request(use_case="u").SerializeToString() + b"\xda\x05\x03\x0a\x01a"  # field 91
    with pytest.raises(Unsupported, match="91"):
        wire.generate_call(pb.GenerateRequest.FromString(unknown))
    assert wire.generate_call(given).selection == UseCaseRef("u", (WeightedName("a", 1.0),))


def test_requests_and_tokens_are_counted_by_use_case(served, world):
    served.client.set_use_case("just-a", {"a": 1.0})
    for _ in range(2):
        served.client.generate("hello", use_case="both", **OPTIONS)
    served.client.generate("hello", use_case="just-a", weights={"a": 0.5}, **OPTIONS)
    served.client.generate("hello", adapter="a", **OPTIONS)  # of no use case
    assert served.client.use_case_counts() == (
        UseCaseCounts("both", 2, 0, 10, 12),
        UseCaseCounts("just-a", 1, 0, 5, 6),
    )
    told = serving_metrics(served.stack.host.metrics())
    assert told["use_case_requests_total.both"] == 2
    assert told["use_case_tokens_total.just-a"] == 6
    assert told["use_case_failures_total.both"] == 0
    assert told["requests_total"] == 4
    assert told["compositions_total"] == 3
    # Deleted, and over a switch to another model, the counts stay.
    served.client.delete_use_case("just-a")
    served.stack.host.switch(world.assignment("two", "other", [("a", "r1")]))
    assert [c.use_case for c in served.client.use_case_counts()] == ["both", "just-a"]


def test_a_request_that_fails_is_counted_with_the_tokens_it_was_sent(served):
    seen: list[None] = []
    sent = 0

    def fail_third() -> None:
        seen.append(None)
        if len(seen) == 3:
            served.engine.faults.append(fault())

    served.engine.before_step = fail_third
    with pytest.raises(EngineFault, match="backend failed"):
        for delta in served.client.stream("hello", use_case="both", **OPTIONS):
            sent += len(delta.token_ids)
    served.engine.before_step = lambda: None
    assert 1 <= sent <= 2  # the text of the last may have been held back
    assert served.client.use_case_counts() == (UseCaseCounts("both", 1, 1, 5, sent),)


def test_a_request_that_was_never_accepted_is_not_counted(served):
    with pytest.raises(RequestInvalid, match="max_tokens"):
        served.client.generate("hello", use_case="both", max_tokens=0)
    with pytest.raises(PromptTooLong):
        served.client.generate("x" * 300, use_case="both", **OPTIONS)
    assert served.client.use_case_counts() == ()


def test_the_base_use_case_is_the_base_model_alone(served, world):
    base = ReleaseUseCase("base", ())
    assignment = world.assignment("two", adapters=[("a", "r1"), ("b", "r1")])
    served.stack.host.switch(replace(assignment, use_cases=(base,)))
    result = served.client.generate("hello", use_case="base", **OPTIONS)
    assert result.token_ids == served.solo("hello", 6)
    assert result.provenance.adapters == ()
    assert served.client.use_cases() == (UseCase("base", {}),)
    with pytest.raises(RequestInvalid, match="use case base has no adapter, not a"):
        served.client.generate("hello", use_case="base", weights={"a": 1.0}, **OPTIONS)
    stubs = pb.SetUseCaseRequest(use_case=pb.UseCase(name="Base"))
    with Client(served.address, timeout_s=30) as client:
        made = client._stubs["UseCases"].Set(stubs)
    assert (made.name, list(made.adapters)) == ("Base", [])
