"""The batch file is honoured or refused, field by field."""

from __future__ import annotations

import json

import pytest

from remora_agent.batch.document import BatchSettings, call_of, read_document
from remora_agent.batch.written import written_biases, written_constraint
from remora_agent.runtime.api import AdapterRef, Constraint, Scoring
from remora_agent.runtime.api import ConstraintKind as KIND
from remora_agent.serving.call import ChatPrompt, Message, TextPrompt
from remora_contract.errors import DocumentInvalid, RequestInvalid, Unsupported

HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def read(**fields: object):
    return read_document(json.dumps({"requests": [HELLO], **fields}).encode(), "input.json")


def request(**fields: object):
    return read(requests=[{**HELLO, **fields}])


def test_a_file_of_requests_alone_takes_edge_llm_defaults():
    settings = read().settings
    assert settings == BatchSettings()
    assert (settings.batch_size, settings.temperature, settings.top_p) == (1, 1.0, 0.8)
    assert (settings.top_k, settings.max_generate_length) == (50, 256)


def test_every_field_reaches_the_generation_call():
    document = read(
        batch_size=4,
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        max_generate_length=9,
        add_generation_prompt=False,
        enable_thinking=True,
        available_lora_weights={"french": "/adapters/french"},
        requests=[HELLO, {**HELLO, "lora_name": "french", "stop": ["###", "\n"]}],
    )
    assert call_of(document, 0, None).selection == ()
    call = call_of(document, 1, seed=10)
    assert call.selection == (AdapterRef("french"),)
    assert call.prompt == ChatPrompt((Message("user", "hello"),), False, {"enable_thinking": True})
    sampling = call.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 3, 0.25)
    assert sampling.seed == 11
    assert call.stopping.max_tokens == 9
    assert call.stopping.stop == ("###", "\n")


def test_content_in_parts_is_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    document = read(requests=[{"messages": [{"role": "user", "content": parts}]}])
    assert document.requests[0].messages == (Message("user", "ab"),)


def test_without_a_template_the_text_is_used_as_it_is():
    call = call_of(read(apply_chat_template=False), 0, None)
    assert call.prompt == TextPrompt("hello")


@pytest.mark.parametrize("name", ["", None])
def test_an_empty_adapter_name_is_the_base_model(name):
    assert call_of(request(lora_name=name), 0, None).selection == ()


def test_one_stop_string_needs_no_list():
    assert request(stop="##").requests[0].stop == ("##",)


def test_fields_that_change_nothing_here_are_accepted():
    request(save_system_prompt_kv_cache=True)


def test_one_request_that_forbids_drafts_turns_them_off_for_the_file():
    assert request().drafts
    assert not request(disable_spec_decode=True).drafts


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"guided_decoding": {}}, "guided_decoding"),
        ({"ego_history_xyz_npy": "x"}, "ego_history_xyz_npy"),
        ({"robot_state": []}, "robot_state"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "audio": "x"}]}]}, "audio"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "x"}]}]}, "video"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(fields, named):
    with pytest.raises(Unsupported, match=named):
        request(**fields)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"beams": 4}, "beams"),
        ({"requests": []}, "requests"),
        ({"requests": {}}, "requests"),
        ({"requests": [3]}, r"requests\[0\]"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": True}, "batch_size"),
        ({"temperature": "hot"}, "temperature"),
        ({"available_lora_weights": {"a/b": "x"}}, "available_lora_weights"),
        ({"available_lora_weights": {"a": 3}}, "available_lora_weights"),
        ({"requests": [{**HELLO, "lora_name": "x"}]}, "lora_name 'x'"),
        ({"requests": [{**HELLO, "seed": 3}]}, "seed"),
        ({"requests": [{"messages": [{"role": "user"}]}]}, r"messages\[0\]"),
        ({"requests": [{"messages": [{"role": "user", "content": 3}]}]}, "content"),
        ({"requests": [{**HELLO, "stop": [3]}]}, "stop"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_place(fields, named):
    with pytest.raises(DocumentInvalid, match=named):
        read(**fields)


def test_values_out_of_range_are_refused_when_the_call_is_made():
    for fields in ({"temperature": -1.0}, {"top_p": 0.0}, {"max_generate_length": 0}):
        with pytest.raises(RequestInvalid):
            call_of(read(**fields), 0, None)


def test_no_json_is_refused_with_the_file_name():
    with pytest.raises(DocumentInvalid, match=r"input\.json"):
        read_document(b"{", "input.json")


def test_sampling_beyond_edge_llm_is_carried_over_and_the_command_line_wins():
    settings = {"min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 3, "logprobs": 2}
    request = {**HELLO, "logit_bias": {"7": -5.0}, "constraint": {"regex": "a+"}}
    data = json.dumps({**settings, "requests": [request]}).encode()
    document = read_document(data, "f").overriding(min_p=0.2, presence_penalty=1.0, logprobs=None)
    call = call_of(document, 0, None)
    assert (call.sampling.min_p, call.sampling.repetition_penalty) == (0.2, 1.2)
    assert (call.sampling.presence_penalty, call.sampling.frequency_penalty) == (1.0, None)
    assert call.sampling.logit_bias == ((7, -5.0),)
    assert call.stopping.min_tokens == 3
    assert call.scoring == Scoring(top=2)
    assert call.constraint == Constraint(KIND.REGEX, "a+")


@pytest.mark.parametrize(
    ("written", "constraint"),
    [
        ({"json_schema": {"type": "null"}}, Constraint(KIND.JSON_SCHEMA, '{"type": "null"}')),
        ({"json_schema": "{}"}, Constraint(KIND.JSON_SCHEMA, "{}")),
        ({"json_object": True}, Constraint(KIND.JSON_OBJECT)),
        ({"lark": 'start: "a"'}, Constraint(KIND.LARK, 'start: "a"')),
        ({"choice": ["a", "b"]}, Constraint(KIND.CHOICE, options=("a", "b"))),
    ],
)
def test_each_kind_of_constraint_is_read(written, constraint):
    assert written_constraint(written, "f") == constraint


@pytest.mark.parametrize(
    "written",
    [
        {},
        {"regex": "a", "lark": "b"},
        {"regex": 1},
        {"regex": ""},
        {"json_object": False},
        {"choice": [1]},
        {"choice": []},
        {"grammar": "a"},
    ],
)
def test_a_constraint_of_another_form_is_refused(written):
    with pytest.raises(DocumentInvalid, match="f: constraint"):
        written_constraint(written, "f")


@pytest.mark.parametrize("token", ["-1", "x", "1.5", "²", "9999999999", ""])
def test_a_bias_needs_a_token_id(token):
    with pytest.raises(DocumentInvalid, match="no token id"):
        written_biases({token: 1.0}, "f")
