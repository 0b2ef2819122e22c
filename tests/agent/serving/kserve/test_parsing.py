"""Tensors, parameters and counts without a server."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.utils import deserialize_bytes_tensor

from remora_agent.runtime.api import Timings
from remora_agent.serving.kserve import inputs, outputs, statistics
from remora_agent.serving.kserve.names import Target
from remora_agent.serving.kserve.parameters import request_parameters
from remora_agent.serving.kserve.request import inference
from remora_agent.serving.kserve.sampling_json import parse_sampling_json
from remora_agent.serving.kserve.tensors import MAX_ELEMENTS, add_output, input_tensors
from remora_contract.errors import InvalidInput, RequestInvalid, Unsupported
from remora_protos.kserve.v2 import grpc_service_pb2 as pb

PAGE = Path(__file__).parents[4] / "docs" / "kserve.md"


def one(datatype: str, shape: list[int], raw: bytes) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="m")
    request.inputs.add(name="x", datatype=datatype, shape=shape)
    request.raw_input_contents.append(raw)
    return request


@given(st.lists(st.text(max_size=20), min_size=1, max_size=20))
def test_text_comes_back_from_its_raw_form(texts):
    response = pb.ModelInferResponse()
    add_output(response, "x", "BYTES", texts)
    raw = response.raw_output_contents[0]
    assert [b.decode() for b in deserialize_bytes_tensor(raw)] == texts
    (tensor,) = input_tensors(one("BYTES", [len(texts)], raw), 1)
    assert [v.decode() for v in tensor.values] == texts


@given(
    st.sampled_from(["BOOL", "INT32", "UINT64", "FP32", "BYTES", "FP16", ""]),
    st.lists(st.integers(-(2**62), 2**62), max_size=4),
    st.binary(max_size=64),
)
def test_whatever_bytes_come_the_tensor_is_right_or_refused(datatype, shape, raw):
    try:
        (tensor,) = input_tensors(one(datatype, shape, raw), 1)
    except RequestInvalid as e:
        assert "'x'" in str(e)
    else:
        assert len(tensor.values) <= MAX_ELEMENTS


@given(st.binary(max_size=200))
def test_whatever_request_comes_it_is_understood_or_refused(blob):
    try:
        request = pb.ModelInferRequest.FromString(blob)
    except Exception:  # noqa: BLE001  # protobuf's own error class depends on its implementation
        return
    with pytest.raises((InvalidInput, Unsupported)):
        inference(request)


@given(st.text(max_size=100))
def test_whatever_json_comes_it_is_understood_or_refused(text):
    try:
        parse_sampling_json(text)
    except RequestInvalid as e:
        assert "sampling_parameters" in str(e)


def test_json_that_is_deeper_or_longer_than_reason_is_refused():
    for text in ("[" * 60_000, '{"stop": "' + "x" * 70_000 + '"}', '{"seed": ' + "9" * 5000 + "}"):
        with pytest.raises(RequestInvalid, match="sampling_parameters"):
            parse_sampling_json(text)


@pytest.mark.parametrize(
    "text",
    [
        '{"stop_token_ids": 0}',
        '{"stop_token_ids": ""}',
        '{"stop_token_ids": false}',
        '{"logit_bias": 0}',
        '{"logit_bias": []}',
        '{"seed": 1, "seed": 2}',
        '{"temperature": NaN}',
        r'{"stop": "\ud800"}',
    ],
)
def test_json_that_would_be_dropped_in_part_is_refused(text):
    with pytest.raises(RequestInvalid, match="sampling_parameters"):
        parse_sampling_json(text)


def test_vllms_words_become_the_inputs_they_mean():
    parsed = parse_sampling_json(
        '{"stop": "x", "n": "1", "top_k": -1, "ignore_eos": "True", "logit_bias": {"7": "2.5"},'
        ' "stop_token_ids": [3]}'
    )
    assert parsed.values == {
        "stop_words": ("x",),
        "num_return_sequences": 1,
        "top_k": 0,
        "ignore_eos": True,
    }
    assert (parsed.logit_bias, parsed.stop_token_ids) == (((7, 2.5),), (3,))


def parameter(**value) -> pb.InferParameter:
    return pb.InferParameter(**value)


def test_tritons_first_priority_level_is_our_highest():
    def priority(level: int) -> int:
        return request_parameters({"priority": parameter(uint64_param=level)}).priority

    assert priority(1) > priority(2) > priority(100) == priority(0) == 0
    with pytest.raises(RequestInvalid, match="priority"):
        priority(101)


def test_a_timeout_is_microseconds_and_zero_is_none():
    assert request_parameters({"timeout": parameter(int64_param=1500)}).timeout_s == 0.0015
    assert request_parameters({"timeout": parameter(int64_param=0)}).timeout_s is None
    with pytest.raises(RequestInvalid, match="timeout"):
        request_parameters({"timeout": parameter(int64_param=-1)})


def test_a_size_of_raw_values_that_are_not_there_is_refused():
    request = pb.ModelInferRequest(model_name="m")
    given = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    given.contents.bytes_contents.append(b"hello")
    given.parameters["binary_data_size"].int64_param = 9
    with pytest.raises(RequestInvalid, match="0 raw bytes came"):
        inference(request)


def test_a_field_of_a_newer_protocol_is_refused():
    request = one("BYTES", [1], struct.pack("<I", 1) + b"x")
    request.MergeFromString(b"\xc2\x3e\x01x")  # field 1000
    with pytest.raises(Unsupported, match="1000"):
        inference(request)


def test_requests_are_counted_however_they_end():
    now = [0]
    made = statistics.Statistics(lambda: now[0], lambda: 5_000_000)
    target = Target("m", "1")
    with made.measuring() as measured:
        measured.target, now[0] = target, 9_000_000_000
        measured.timings = Timings(1.0, 2.0, 3.0, 3.0)
    with pytest.raises(ValueError), made.measuring() as measured:
        measured.target = target
        raise ValueError
    with made.measuring():
        pass  # no model has its name
    counts = made.of("m", "1")
    seconds = [d.ns / 1e9 for d in (counts.success, counts.queue, counts.infer, counts.around)]
    assert seconds == [9, 1, 5, 3]
    assert (counts.success.count, counts.fail.count, counts.last_ms) == (1, 1, 5)


def test_beyond_the_bound_names_are_counted_together(monkeypatch):
    monkeypatch.setattr(statistics, "MAX_COUNTED", 2)
    made = statistics.Statistics(lambda: 0, lambda: 0)
    for name in "abcda":
        with made.measuring() as measured:
            measured.target = Target(name, "1")
    counted = {name: counts.fail.count for name, _, counts in made.all()}
    assert counted == {"a": 2, "b": 1, "(other)": 2}


def test_the_page_names_every_call_input_and_output():
    text = PAGE.read_text()
    names = {*inputs.INPUTS, *inputs.ALIASES, *outputs.OUTPUTS}
    assert {n for n in names if f"`{n}`" not in text} == set()
    service = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    for method in service.methods:
        assert method.name in text or "SharedMemory" in method.name, method.name
