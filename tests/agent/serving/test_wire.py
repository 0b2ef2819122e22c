"""Every field of a request is carried over or refused by name."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_agent.runtime import api
from remora_agent.serving import adapter_wire, wire
from remora_agent.serving.call import (
    ChatPrompt,
    GenerateCall,
    Message,
    SamplingOverrides,
    StoppingOverrides,
    TextPrompt,
    TokenPrompt,
    UseCaseRef,
)
from remora_contract.errors import DocumentInvalid, RequestInvalid, Unsupported
from remora_contract.release import WeightedName
from remora_protos.inference.v1 import inference_pb2 as pb


def request(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"text": "hi", **fields})


def mix(**fields: object) -> pb.AdapterMix:
    return pb.AdapterMix(adapters=[pb.WeightedAdapter(**fields)])


def weighted(name: str) -> pb.WeightedAdapter:
    return pb.WeightedAdapter(name=name)


def test_a_bare_text_request_leaves_every_choice_to_the_agent():
    assert wire.generate_call(request()) == GenerateCall(TextPrompt("hi"))


def test_every_field_of_a_full_request_arrives():
    message = pb.GenerateRequest(
        request_id="r1",
        chat=pb.Chat(
            messages=[pb.ChatMessage(role="user", content="hello")],
            add_generation_prompt=False,
            template_arguments_json='{"enable_thinking": true}',
        ),
        adapters=pb.AdapterMix(
            adapters=[
                pb.WeightedAdapter(name="a", revision="r7", weight=0.5),
                pb.WeightedAdapter(name="b"),
            ]
        ),
        sampling=pb.Sampling(temperature=0.5, top_k=3, top_p=0.25, seed=9),
        stopping=pb.Stopping(max_tokens=4, stop=["x"], stop_token_ids=[5], ignore_eos=True),
    )
    assert wire.generate_call(message) == GenerateCall(
        prompt=ChatPrompt((Message("user", "hello"),), False, {"enable_thinking": True}),
        selection=(api.AdapterRef("a", "r7", 0.5), api.AdapterRef("b", None, 1.0)),
        sampling=SamplingOverrides(0.5, 3, 0.25, 9),
        stopping=StoppingOverrides(4, ("x",), (5,), True),
        request_id="r1",
    )


def test_token_ids_and_use_cases_are_carried():
    message = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2]), use_case="support")
    call = wire.generate_call(message)
    assert call.prompt == TokenPrompt((1, 2))
    assert call.selection == UseCaseRef("support")


def test_priority_client_and_salt_are_carried():
    message = request(priority=-3, client="shop", cache_salt="tenant")
    assert wire.generate_call(message).share == api.Share(-3, "shop", "tenant")
    assert wire.generate_call(request()).share == api.Share()


def test_zero_is_a_choice_and_not_an_absence():
    message = request(sampling=pb.Sampling(temperature=0.0, top_k=0, seed=0))
    assert wire.generate_call(message).sampling == SamplingOverrides(0.0, 0, None, 0)
    weight = wire.generate_call(request(adapters=mix(name="a", weight=0.0))).selection
    assert weight == (api.AdapterRef("a", None, 0.0),)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"text": ""}, "text"),
        ({"token_ids": pb.TokenIds()}, "token_ids"),
        ({"chat": pb.Chat()}, "chat.messages"),
        ({"chat": pb.Chat(messages=[pb.ChatMessage(role="robot")])}, "role"),
        ({"chat": pb.Chat(messages=[pb.ChatMessage(role="user")] * 1025)}, "1 to 1024 messages"),
        ({"adapters": pb.AdapterMix(adapters=[*map(weighted, "abcdefghi")])}, "at most 8"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"request_id": "a\nb"}, "request_id"),
        ({"adapters": pb.AdapterMix()}, "adapters"),
        ({"adapters": mix(name="a", weight=math.nan)}, "weight of a"),
        ({"adapters": mix(name="a", weight=math.inf)}, "weight of a"),
        ({"adapters": pb.AdapterMix(adapters=[pb.WeightedAdapter(name="a")] * 2)}, "twice"),
        ({"sampling": pb.Sampling(temperature=-0.1)}, "temperature"),
        ({"sampling": pb.Sampling(temperature=math.nan)}, "temperature"),
        ({"sampling": pb.Sampling(temperature=math.inf)}, "temperature"),
        ({"sampling": pb.Sampling(top_p=0.0)}, "top_p"),
        ({"sampling": pb.Sampling(top_p=1.5)}, "top_p"),
        ({"sampling": pb.Sampling(top_p=math.nan)}, "top_p"),
        ({"stopping": pb.Stopping(max_tokens=0)}, "max_tokens"),
        ({"stopping": pb.Stopping(stop=[""])}, "stop[0]"),
        ({"stopping": pb.Stopping(stop=["s"] * 17)}, "stopping.stop"),
        ({"stopping": pb.Stopping(stop_token_ids=range(257))}, "stop_token_ids"),
        ({"priority": 101}, "priority"),
        ({"priority": -101}, "priority"),
        ({"client": "x" * 129}, "client"),
        ({"client": "a\nb"}, "client"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
    ],
)
def test_a_field_out_of_range_is_refused_by_name(fields, named):
    with pytest.raises(RequestInvalid, match=named.replace("[", r"\[")):
        wire.generate_call(request(**fields))


@pytest.mark.parametrize("name", ["", "../etc", "a b", "x" * 129])
def test_names_that_are_no_names_are_refused(name):
    for fields in ({"adapters": mix(name=name)}, {"use_case": name}):
        with pytest.raises(DocumentInvalid):
            wire.generate_call(request(**fields))


def test_a_request_without_input_is_refused():
    with pytest.raises(RequestInvalid, match="text, chat, token_ids"):
        wire.generate_call(pb.GenerateRequest())


@pytest.mark.parametrize(
    "text",
    [
        *("[1]", "3", "{", '"x"', '{"messages": []}', '{"a b": 1}', "[" * 5000, "{" + " " * 20000),
        *(
            '{"a": NaN}',
            '{"a": 1, "a": 2}',
            r'{"a": "\ud800"}',
            '{"a": ' + "[" * 70 + "]" * 70 + "}",
        ),
    ],
)
def test_template_arguments_must_be_one_harmless_json_object(text):
    with pytest.raises(RequestInvalid, match="template_arguments_json"):
        wire.template_arguments(text)


def test_a_field_of_a_newer_protocol_is_refused_at_any_depth():
    # Field 1000 (length-delimited), unknown today.
    unknown = b"\xc2\x3e\x01x"
    top = pb.GenerateRequest.FromString(request().SerializeToString() + unknown)
    deep = request()
    deep.sampling.MergeFromString(unknown)
    for message in (top, deep):
        with pytest.raises(Unsupported, match="1000"):
            wire.generate_call(message)


def test_special_tokens_are_a_choice_for_text_only():
    text = pb.TokenizeRequest(text="a", add_special_tokens=False)
    assert wire.tokenize_prompt(text) == TextPrompt("a", add_special_tokens=False)
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="a")])
    with pytest.raises(RequestInvalid, match="add_special_tokens"):
        wire.tokenize_prompt(pb.TokenizeRequest(chat=chat, add_special_tokens=True))


PROVENANCE = api.Provenance("sha256:b", "sha256:e", (api.AnsweringAdapter("a", "1", "d", 0.5),))


def test_the_last_event_carries_everything_the_runtime_said():
    finished = api.Finished(
        api.FinishReason.LENGTH,
        api.Usage(7, 3, 2),
        api.Timings(0.1, 0.2, 0.3, 0.4),
        PROVENANCE,
        stop_match="##",
    )
    message = wire.event(finished).finished
    assert message.finish_reason == pb.FINISH_REASON_LENGTH
    usage = message.usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (7, 3, 2)
    assert message.timings.time_to_first_token_s == 0.4
    assert message.timings.queue_s == 0.1
    assert message.stop_match == "##"
    assert message.provenance.bundle_digest == "sha256:b"
    assert message.provenance.engine_digest == "sha256:e"
    assert message.provenance.adapters[0] == pb.AnsweringAdapter(
        name="a", revision="1", digest="d", weight=0.5
    )


def test_every_finish_reason_has_a_wire_value():
    for reason in api.FinishReason:
        finished = api.Finished(reason, api.Usage(0, 0, 0), api.Timings(0, 0, 0, 0), PROVENANCE)
        assert wire.finished(finished).finish_reason != pb.FINISH_REASON_UNSPECIFIED


@given(st.text(), st.lists(st.integers(0, 2**32 - 1)))
def test_a_delta_survives_the_wire(text, ids):
    made = wire.event(api.Delta(text, tuple(ids)))
    read = pb.GenerateEvent.FromString(made.SerializeToString())
    assert read.delta.text == text
    assert list(read.delta.token_ids) == ids


def test_a_use_case_follows_aliases_and_fixes_no_revision():
    use_case = pb.UseCase(name="u", adapters=[pb.WeightedAdapter(name="a", weight=0.5)])
    assert adapter_wire.weighted_names(use_case) == (WeightedName("a", 0.5),)
    use_case.adapters[0].revision = "r1"
    with pytest.raises(RequestInvalid, match="leave the revision out"):
        adapter_wire.weighted_names(use_case)


def test_an_unknown_unload_mode_is_refused():
    assert adapter_wire.unload_mode(pb.UNLOAD_MODE_UNSPECIFIED).value == "graceful"
    with pytest.raises(RequestInvalid):
        adapter_wire.unload_mode(99)


def test_every_sampling_option_bias_and_logprobs_are_carried_over():
    request = pb.GenerateRequest(text="hi")
    sampling = request.sampling
    sampling.min_p, sampling.repetition_penalty = 0.25, 1.5
    sampling.presence_penalty, sampling.frequency_penalty = -0.5, 2.0
    sampling.logit_bias[7] = -100.0
    request.stopping.min_tokens = 3
    request.logprobs.top = 2
    call = wire.generate_call(request)
    assert call.sampling == SamplingOverrides(
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=2.0,
        logit_bias=((7, -100.0),),
    )
    assert call.stopping.min_tokens == 3
    assert call.scoring.top == 2 and call.scoring.prompt_top is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("presence_penalty", 2.5),
        ("frequency_penalty", float("-inf")),
        *(
            (name, float("nan"))
            for name in ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        ),
    ],
)
def test_a_sampling_number_out_of_range_is_named(field, value):
    request = pb.GenerateRequest(text="hi")
    setattr(request.sampling, field, value)
    with pytest.raises(RequestInvalid, match=f"sampling.{field} must be"):
        wire.generate_call(request)


def test_biases_are_bounded_in_number_and_size():
    request = pb.GenerateRequest(text="hi")
    request.sampling.logit_bias[3] = 101.0
    with pytest.raises(RequestInvalid, match="logit_bias of token 3"):
        wire.generate_call(request)
    request.sampling.logit_bias[3] = float("nan")
    with pytest.raises(RequestInvalid, match="logit_bias of token 3"):
        wire.generate_call(request)
    for token in range(1025):
        request.sampling.logit_bias[token] = 1.0
    with pytest.raises(RequestInvalid, match="at most 1024"):
        wire.generate_call(request)


def test_more_logprobs_than_the_bound_are_refused():
    request = pb.GenerateRequest(text="hi")
    request.logprobs.top = 21
    with pytest.raises(RequestInvalid, match="logprobs"):
        wire.generate_call(request)
    request.logprobs.top = 20
    request.prompt_logprobs.top = 21
    with pytest.raises(RequestInvalid, match="prompt_logprobs"):
        wire.generate_call(request)
    request.prompt_logprobs.top = 1
    assert wire.generate_call(request).scoring == api.Scoring(20, 1)


@pytest.mark.parametrize(
    ("made", "constraint"),
    [
        ({"json_schema": "{}"}, api.Constraint(api.ConstraintKind.JSON_SCHEMA, "{}")),
        ({"regex": "a+"}, api.Constraint(api.ConstraintKind.REGEX, "a+")),
        ({"lark": "start: x"}, api.Constraint(api.ConstraintKind.LARK, "start: x")),
        ({"json_object": True}, api.Constraint(api.ConstraintKind.JSON_OBJECT)),
        (
            {"choice": pb.Choices(options=["a", "b"])},
            api.Constraint(api.ConstraintKind.CHOICE, options=("a", "b")),
        ),
    ],
)
def test_every_kind_of_constraint_is_carried_over(made, constraint):
    call = wire.generate_call(request(constraint=pb.Constraint(**made)))
    assert call.constraint == constraint


@pytest.mark.parametrize(
    "made",
    [
        {},
        {"json_object": False},
        {"regex": ""},
        {"choice": pb.Choices()},
        {"lark": "x" * (65 << 10)},
    ],
)
def test_an_empty_or_oversized_constraint_is_refused(made):
    with pytest.raises(RequestInvalid, match="constraint"):
        wire.generate_call(request(constraint=pb.Constraint(**made)))


def test_a_constraint_decides_on_the_end_and_so_excludes_ignoring_it():
    asked = request(constraint=pb.Constraint(regex="a"), stopping=pb.Stopping(ignore_eos=True))
    with pytest.raises(RequestInvalid, match="ignore_eos"):
        wire.generate_call(asked)


def test_n_and_echo_are_carried_over_and_none_is_one():
    call = wire.generate_call(request(n=3, echo=True))
    assert (call.n, call.echo) == (3, True)
    assert wire.generate_call(request()).n == 1
    with pytest.raises(RequestInvalid, match="n must be"):
        wire.generate_call(request(n=65))
