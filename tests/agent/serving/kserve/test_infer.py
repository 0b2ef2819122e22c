"""ModelInfer: the whole answer at once, driven by the unchanged tritonclient."""

from __future__ import annotations

import json
import queue
import threading

import grpc
import pytest
import tritonclient.grpc as triton_client
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import InferenceServerException

from remora_protos.inference.v1 import inference_pb2 as own_pb
from remora_protos.inference.v1 import inference_pb2_grpc as own_rpc
from tests.support.triton import inputs, outputs, streaming, tensor, text_of


def test_an_answer_is_the_models_with_its_counts_times_and_digests(served, triton, text, world):
    result = triton.infer("base", inputs("hello"), request_id="mine")
    assert text_of(result) == text("hello")
    response = result.get_response()
    assert (response.id, response.model_name, response.model_version) == ("mine", "base", "1")
    assert result.as_numpy("finish_reason")[0] == b"length"
    assert result.as_numpy("num_input_tokens").tolist() == [5]
    assert result.as_numpy("num_output_tokens").tolist() == [8]
    assert result.as_numpy("time_to_first_token_s")[0] > 0
    assert result.as_numpy("bundle_digest")[0].decode() == world.bundle("base").digest
    assert result.as_numpy("adapter_digests").tolist() == []


@pytest.mark.parametrize(
    ("model", "options", "mix"),
    [
        ("base", {}, {}),
        ("ensemble", {}, {}),
        ("tensorrt_llm_bls", {}, {}),
        ("base:a", {}, {"a": 1.0}),
        ("ensemble:b", {}, {"b": 1.0}),
        ("base:both", {}, {"a": 0.5, "b": 0.25}),
        ("base", {"adapter": "a"}, {"a": 1.0}),
        ("base", {"adapter": "a@r1"}, {"a": 1.0}),
        ("base", {"adapter": ["a", "b"]}, {"a": 1.0, "b": 1.0}),
        ("base", {"adapter": ["a", "b"], "adapter_weight": [0.5, 2.0]}, {"a": 0.5, "b": 2.0}),
        ("base", {"lora_name": "b"}, {"b": 1.0}),
        ("base", {"use_case": "both"}, {"a": 0.5, "b": 0.25}),
        ("base", {"sampling_parameters": '{"lora_name": "a"}'}, {"a": 1.0}),
    ],
)
def test_each_way_to_choose_adapters_takes_effect(served, triton, text, model, options, mix):
    result = triton.infer(model, inputs("hello", **options))
    assert text_of(result) == text("hello", 8, mix)
    digests = [d.decode() for d in result.as_numpy("adapter_digests")]
    assert digests == [served.digests[name] for name in mix]


def test_values_travel_raw_or_in_contents_and_with_a_batch_of_one(served, triton, text):
    options = {"stop_words": ["zzz", ""], "seed": 7, "top_k": 1, "adapter": ["a"]}
    want = text("hello", 8, {"a": 1.0})
    assert text_of(triton.infer("base", inputs("hello", **options))) == want
    assert text_of(triton.infer("base", inputs("hello", batched=True, **options))) == want
    request = pb.ModelInferRequest(model_name="base")
    fields = {
        "text_input": ("BYTES", "bytes_contents", b"hello"),
        "max_tokens": ("INT32", "int_contents", 8),
        "seed": ("UINT64", "uint64_contents", 7),
        "temperature": ("FP32", "fp32_contents", 0.0),
        "ignore_eos": ("BOOL", "bool_contents", True),
        "adapter": ("BYTES", "bytes_contents", b"a"),
    }
    for name, (datatype, field, value) in fields.items():
        given = request.inputs.add(name=name, datatype=datatype, shape=[1])
        getattr(given.contents, field).append(value)
    answer = triton._client_stub.ModelInfer(request)
    assert triton_client.InferResult(answer).as_numpy("text_output")[0].decode() == want


@pytest.mark.parametrize(
    "parameters",
    [
        {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, "adapter": "a"},
        {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "lora_name": "a"},
    ],
)
def test_options_may_be_request_parameters(served, triton, text, parameters):
    result = triton.infer("base", [tensor("text_input", "hello")], parameters=parameters)
    assert text_of(result) == text("hello", 8, {"a": 1.0})


def test_vllms_sampling_parameters_are_read_numbers_as_text_too(served, triton, text):
    given = {"temperature": "0.0", "max_tokens": "8", "ignore_eos": True, "top_k": -1, "seed": None}
    blob = json.dumps(given)
    prompt = [tensor("text_input", "hello"), tensor("sampling_parameters", blob)]
    assert text_of(triton.infer("base", prompt)) == text("hello")


def test_the_words_other_backends_use_for_nothing_change_nothing(served, triton, text):
    neutral = {
        "bad_words": [""],
        "stop_words": [""],
        "pad_id": 257,
        "top_p": 0.0,
        "beam_width": 1,
        "num_return_sequences": 1,
        "length_penalty": 1.0,
        "exclude_input_in_output": True,
        "return_log_probs": False,
        "return_context_logits": False,
        "return_generation_logits": False,
        "return_perf_metrics": False,
        "stream": False,
    }
    assert text_of(triton.infer("base", inputs("hello", **neutral))) == text("hello")


def test_sampling_obeys_its_seed(served, triton):
    def sampled(**options):
        return text_of(triton.infer("base", inputs("hello", temperature=3.0, **options)))

    assert sampled(seed=1) == sampled(random_seed=1, seed=None) == sampled(seed=1)
    assert len({sampled(seed=seed) for seed in range(8)}) > 1


def test_stop_words_and_an_end_token_end_the_answer(served, triton, text):
    whole = text("hello", 8)
    result = triton.infer("base", inputs("hello", stop_words=["never", whole[3:5]]))
    assert text_of(result) == whole[: whole.index(whole[3:5])]
    assert result.as_numpy("finish_reason")[0] == b"stop"
    ended = triton.infer("base", inputs("hello", end_id=served.solo("hello", 8)[4]))
    assert ended.as_numpy("num_output_tokens")[0] <= 5


def test_outputs_are_those_that_the_request_wants(served, triton):
    def names(given, **options):
        response = triton.infer("base", given, **options).get_response()
        return [output.name for output in response.outputs]

    asked = outputs("finish_reason", "text_output")
    assert names(inputs("x"), outputs=asked) == ["text_output", "finish_reason"]
    with_counts = inputs("x", return_num_output_tokens=True)
    assert names(with_counts, outputs=outputs("text_output"))[1:] == ["num_output_tokens"]
    assert "finish_reason" not in names(inputs("x", return_finish_reason=False))
    with pytest.raises(InferenceServerException, match="num_output_tokens"):
        triton.infer(
            "base",
            inputs("x", return_num_output_tokens=False),
            outputs=outputs("num_output_tokens"),
        )


def test_log_probabilities_come_when_they_are_asked_for(served, triton):
    sampling, stopping = {"temperature": 0.0}, {"max_tokens": 8, "ignore_eos": True}
    request = own_pb.GenerateRequest(
        text="hello", logprobs=own_pb.Logprobs(), sampling=sampling, stopping=stopping
    )
    with grpc.insecure_channel(served.address) as channel:
        scored = own_rpc.InferenceStub(channel).GenerateUnary(request, timeout=30).logprobs
    want = [one.logprob for one in scored]
    assert len(want) == 8
    result = triton.infer("base", inputs("hello", return_log_probs=True))
    assert result.as_numpy("output_log_probs").tolist() == pytest.approx(want, rel=1e-6)
    assert result.as_numpy("cum_log_probs").tolist() == pytest.approx([sum(want)], rel=1e-6)
    listed = triton.infer("base", inputs("hello"), outputs=outputs("cumulative_logprob"))
    assert listed.as_numpy("cumulative_logprob")[0] == result.as_numpy("cum_log_probs")[0]
    assert triton.infer("base", inputs("hello")).as_numpy("cum_log_probs") is None
    with streaming(triton) as stream:
        stream.send("base", "hello", return_log_probs=True)
        pieces = stream.all()
    together = [p for r in pieces for p in r.as_numpy("output_log_probs")]
    assert together == result.as_numpy("output_log_probs").tolist()
    assert pieces[-1].as_numpy("cum_log_probs")[0] == result.as_numpy("cum_log_probs")[0]


NOT_FOUND, INVALID = "NOT_FOUND", "INVALID_ARGUMENT"
UNSUPPORTED = "UNIMPLEMENTED"


@pytest.mark.parametrize(
    ("options", "status", "named"),
    [
        ({"text_input": "", "text": ""}, INVALID, "text"),
        ({"text": b"\xff\xfe"}, INVALID, "text_input"),
        ({"temperature": float("nan")}, INVALID, "temperature"),
        ({"temperature": -1.0}, INVALID, "temperature"),
        ({"top_p": 1.5}, INVALID, "top_p"),
        ({"top_k": -2}, INVALID, "top_k"),
        ({"max_tokens": 0}, INVALID, "max_tokens"),
        ({"max_tokens": -1}, INVALID, "max_tokens"),
        ({"end_id": -1}, INVALID, "end_id"),
        ({"adapter": "zzz"}, NOT_FOUND, "zzz"),
        ({"adapter": "a@r9"}, NOT_FOUND, "r9"),
        ({"adapter": "a@"}, INVALID, "revision"),
        ({"lora_name": "a@"}, INVALID, "revision"),
        ({"adapter": "../../etc/passwd"}, INVALID, "adapter"),
        ({"adapter": ["a", "a"]}, INVALID, "twice"),
        ({"adapter": ["a"], "adapter_weight": [float("nan")]}, INVALID, "weight"),
        ({"adapter": ["a"], "adapter_weight": [1.0, 2.0]}, INVALID, "adapter_weight"),
        ({"adapter_weight": [1.0]}, INVALID, "adapter_weight"),
        ({"adapter": "a", "use_case": "both"}, INVALID, "use_case"),
        ({"lora_name": "a", "adapter": "b"}, INVALID, "lora_name"),
        ({"use_case": "zzz"}, NOT_FOUND, "zzz"),
        ({"lora_task_id": 3}, UNSUPPORTED, "lora_task_id"),
        ({"bad_words": ["x"]}, UNSUPPORTED, "bad_words"),
        ({"beam_width": 4}, UNSUPPORTED, "beam_width"),
        ({"num_return_sequences": 2}, UNSUPPORTED, "num_return_sequences"),
        ({"length_penalty": 0.5}, UNSUPPORTED, "length_penalty"),
        ({"return_logprobs": True}, UNSUPPORTED, "return_logprobs"),
        ({"return_context_logits": True}, UNSUPPORTED, "context_logits"),
        ({"return_perf_metrics": True}, UNSUPPORTED, "return_perf_metrics"),
        ({"stream": True}, INVALID, "stream"),
        ({"beams": 3}, INVALID, "beams"),
        ({"seed": 1, "random_seed": 1}, INVALID, "given twice"),
        ({"sampling_parameters": "[]"}, INVALID, "sampling_parameters"),
        ({"sampling_parameters": "{"}, INVALID, "JSON"),
        ({"sampling_parameters": '{"best_of": 2}'}, INVALID, "best_of"),
        ({"sampling_parameters": '{"max_tokens": 3}'}, INVALID, "max_tokens is given twice"),
        ({"sampling_parameters": '{"top_k": 1.5}'}, INVALID, "top_k"),
        ({"guided_decoding_guide_type": "lark"}, INVALID, "guided_decoding_guide_type"),
        ({"guided_decoding_guide": "x"}, INVALID, "guided_decoding_guide_type"),
        ({"text": "x" * 300}, INVALID, "context"),
        ({"stop_words": ["x"] * 17}, INVALID, "stop"),
        ({"text": ["one", "two"]}, INVALID, "text_input"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(served, triton, options, status, named):
    options = dict(options)
    options.pop("text_input", None)
    given = inputs(options.pop("text", "hello"), **options)
    with pytest.raises(InferenceServerException, match=named) as refused:
        triton.infer("base", given)
    assert refused.value.status() == f"StatusCode.{status}"


def contents(name: str, datatype: str, shape: list[int], raw: bytes) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="base")
    request.inputs.add(name=name, datatype=datatype, shape=shape)
    request.raw_input_contents.append(raw)
    return request


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (contents("text_input", "BYTES", [1], b"\x05\x00\x00\x00hell"), "text_input"),
        (contents("text_input", "BYTES", [1], b"\xff\xff\xff\xff"), "text_input"),
        (contents("text_input", "BYTES", [1], b"\x00"), "length"),
        (contents("text_input", "BYTES", [2], b"\x00\x00\x00\x00"), "shape"),
        (contents("text_input", "BYTES", [-1], b"\x00\x00\x00\x00"), "shape"),
        (contents("text_input", "BYTES", [1 << 40, 1 << 40], b""), "at most"),
        (contents("stop_words", "BYTES", [0, 1 << 40], b""), "at most"),
        (contents("text_input", "BYTES", [1, 1, 1], b"\x00\x00\x00\x00"), "shape"),
        (contents("text_input", "BYTES", [], b"\x00\x00\x00\x00"), "shape"),
        (contents("stop_words", "BYTES", [2, 1], b"\x00\x00\x00\x00" * 2), "batch of 2"),
        (contents("text_input", "TEXT", [1], b"x"), "datatype"),
        (contents("text_input", "INT32", [1], b"\x00\x00\x00\x00"), "datatype INT32"),
        (contents("temperature", "FP32", [1], b"\x00\x00"), "4 bytes, not 2"),
        (contents("max_tokens", "INT32", [1], b"\x08\x00\x00\x00"), "text_input is missing"),
    ],
)
def test_broken_tensors_are_refused_by_name(served, triton, request_, named):
    with pytest.raises(grpc.RpcError, match=named) as refused:
        triton._client_stub.ModelInfer(request_)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_values_half_raw_half_in_contents_are_refused(served, triton):
    request = contents("text_input", "BYTES", [1], b"\x01\x00\x00\x00x")
    request.inputs[0].contents.bytes_contents.append(b"x")
    with pytest.raises(grpc.RpcError, match="beside raw_input_contents"):
        triton._client_stub.ModelInfer(request)
    request.inputs.add(name="max_tokens", datatype="INT32", shape=[1]).contents.int_contents.append(
        1
    )
    with pytest.raises(grpc.RpcError, match="raw_input_contents"):
        triton._client_stub.ModelInfer(request)


def test_an_input_given_twice_is_refused(served, triton):
    given = [*inputs("hello"), tensor("text_input", "other")]
    with pytest.raises(InferenceServerException, match="'text_input' is given twice"):
        triton.infer("base", given)
    with pytest.raises(InferenceServerException, match="max_tokens is given twice"):
        triton.infer("base", inputs("hello"), parameters={"max_tokens": 3})


@pytest.mark.parametrize(
    ("parameters", "status", "named"),
    [
        ({"zzz": 1}, INVALID, "zzz"),
        ({"max_tokens": "8"}, INVALID, "takes int64_param"),
        ({"max_tokens": True}, INVALID, "max_tokens"),
        ({"text_input": "x"}, INVALID, "text_input"),
        ({"lora_task_id": 1}, UNSUPPORTED, "lora_task_id"),
        ({"classification": 3}, UNSUPPORTED, "classification"),
    ],
)
def test_parameters_are_refused_by_name(served, triton, parameters, status, named):
    with pytest.raises(InferenceServerException, match=named) as refused:
        triton.infer("base", inputs("x", max_tokens=None), parameters=parameters)
    assert refused.value.status() == f"StatusCode.{status}"


def test_the_size_that_kserves_client_tells_of_raw_values_is_checked(served, triton, text):
    """It comes with every input of its InferenceGRPCClient."""
    given = inputs("hello")
    for one in given:
        one._input.parameters["binary_data_size"].int64_param = len(one._raw_content)
    assert text_of(triton.infer("base", given)) == text("hello")
    given[0]._input.parameters["binary_data_size"].int64_param += 1
    with pytest.raises(InferenceServerException, match="binary_data_size is 10; 9 raw bytes"):
        triton.infer("base", given)
    given[0]._input.parameters["binary_data_size"].string_param = "9"
    with pytest.raises(InferenceServerException, match="takes int64_param"):
        triton.infer("base", given)


def test_sequences_are_refused(served, triton):
    with pytest.raises(InferenceServerException, match="sequence_"):
        triton.infer("base", inputs("x"), sequence_id=7, sequence_start=True)


def test_shared_memory_is_refused_wherever_it_is_asked_for(served, triton):
    given = triton_client.InferInput("text_input", [1], "BYTES")
    given.set_shared_memory("region", 8)
    with pytest.raises(InferenceServerException, match="shared memory") as refused:
        triton.infer("base", [given])
    assert refused.value.status() == "StatusCode.UNIMPLEMENTED"
    wanted = triton_client.InferRequestedOutput("text_output")
    wanted.set_shared_memory("region", 8)
    with pytest.raises(InferenceServerException, match="shared memory"):
        triton.infer("base", inputs("x"), outputs=[wanted])


@pytest.mark.parametrize("name", ["logprobs", "generation_logits", "context_logits", "zzz"])
def test_outputs_that_are_not_offered_are_refused_by_name(served, triton, name):
    with pytest.raises(InferenceServerException, match=name) as refused:
        triton.infer("base", inputs("x"), outputs=outputs(name))
    assert refused.value.status() == "StatusCode.UNIMPLEMENTED"


@pytest.mark.parametrize(
    ("model", "version"), [("zzz", ""), ("base:zzz", ""), ("base:a", "r9"), ("base", "7"), ("", "")]
)
def test_unknown_models_and_versions_are_not_found(served, triton, model, version):
    with pytest.raises(InferenceServerException) as refused:
        triton.infer(model, inputs("x"), model_version=version)
    assert refused.value.status() == "StatusCode.NOT_FOUND"


def test_a_models_name_and_an_input_cannot_both_choose(served, triton):
    with pytest.raises(InferenceServerException, match="base:a chooses"):
        triton.infer("base:a", inputs("x", adapter="b"))


def test_a_name_that_an_adapter_and_a_use_case_have_is_refused(served, triton, text):
    served.client.set_use_case("a", {"b": 1.0})
    with pytest.raises(InferenceServerException, match="adapter and a use case"):
        triton.infer("base:a", inputs("hello"))
    named = triton.infer("base", inputs("hello", use_case="a"))
    assert text_of(named) == text("hello", 8, {"b": 1.0})


def test_a_request_runs_out_of_the_time_it_gives_itself(served, triton):
    served.engine.before_step = lambda: threading.Event().wait(0.02)
    with pytest.raises(InferenceServerException) as late:
        triton.infer("base", inputs("x", max_tokens=200), timeout=200_000)
    assert late.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    assert "Deadline" not in late.value.message()  # the agent's word, not the client's


def test_clients_may_use_the_same_request_id_at_the_same_time(served, triton):
    served.engines.gate.clear()
    heard: queue.Queue = queue.Queue()
    for prompt in ("one", "two"):
        triton.async_infer(
            "base", inputs(prompt), lambda result, error: heard.put((result, error)), request_id="1"
        )
    served.engines.gate.set()
    answers = [heard.get(timeout=30) for _ in range(2)]
    assert [error for _, error in answers] == [None, None]
    assert [result.get_response().id for result, _ in answers] == ["1", "1"]


def test_a_caller_that_gives_up_frees_its_row(served, triton):
    pause = threading.Event()
    served.engine.before_step = lambda: pause.wait(0.01)
    ended: queue.Queue = queue.Queue()
    call = triton.async_infer(
        "base", inputs("hello", max_tokens=240), lambda result, error: ended.put(error)
    )
    while served.client.status().rows_busy == 0:
        pause.wait(0.01)
    call.cancel()
    assert "CANCELLED" in str(ended.get(timeout=30))
    while served.client.status().rows_busy:
        pause.wait(0.01)
    assert served.client.status().tokens_generated < 240
