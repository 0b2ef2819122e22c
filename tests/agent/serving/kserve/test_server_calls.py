"""Server, metadata, configuration, repository and statistics, by the unchanged tritonclient."""

from __future__ import annotations

import threading

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton_client
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.utils import InferenceServerException

from remora_agent.runtime.adapters import Tier
from tests.support.serving import running_stack
from tests.support.triton import inputs, streaming, text_of

SERVICE = "inference.GRPCInferenceService"


def test_a_server_without_a_model_is_live_and_not_ready(tmp_path, engines, world):
    with (
        running_stack(tmp_path, engines) as (stack, address),
        triton_client.InferenceServerClient(address) as client,
    ):
        assert client.is_server_live()
        assert not client.is_server_ready()
        assert not client.is_model_ready("base")
        with pytest.raises(InferenceServerException, match="no model is loaded") as early:
            client.infer("base", inputs("x"))
        assert early.value.status() == "StatusCode.UNAVAILABLE"
        stack.host.switch(world.assignment())
        assert client.is_server_ready()
        assert client.is_model_ready("base")


@pytest.mark.parametrize("name", ["base", "ensemble", "tensorrt_llm_bls", "base:a", "base:both"])
def test_every_name_that_answers_is_ready_and_described(served, triton, name):
    assert triton.is_model_ready(name)
    metadata = triton.get_model_metadata(name)
    assert metadata.name == name
    assert list(metadata.versions) == (["r1"] if name == "base:a" else ["1"])
    declared = {i.name: i.datatype for i in metadata.inputs}
    assert declared["text_input"] == "BYTES"
    assert (declared["max_tokens"], declared["seed"]) == ("INT32", "UINT64")
    assert {"text_output", "num_output_tokens"} <= {o.name for o in metadata.outputs}
    config = triton.get_model_config(name).config
    assert (config.name, config.max_batch_size) == (name, 0)
    assert config.model_transaction_policy.decoupled
    assert [i.name for i in config.input if not i.optional] == ["text_input"]
    assert [i.name for i in config.input] == list(declared)
    assert [o.name for o in config.output] == [o.name for o in metadata.outputs]


@pytest.mark.parametrize("name", ["zzz", "base:zzz", "base:", ""])
def test_names_nobody_has_are_not_ready_and_not_described(served, triton, name):
    assert not triton.is_model_ready(name)
    for ask in (triton.get_model_metadata, triton.get_model_config):
        with pytest.raises(InferenceServerException) as unknown:
            ask(name)
        assert unknown.value.status() == "StatusCode.NOT_FOUND"


def test_the_server_advertises_what_it_does_and_no_more(served, triton):
    metadata = triton.get_server_metadata()
    assert metadata.name == "remora"
    assert metadata.version
    assert {"statistics", "model_repository", "parameters"} <= set(metadata.extensions)
    for absent in ("system_shared_memory", "cuda_shared_memory", "sequence", "trace", "logging"):
        assert absent not in metadata.extensions


def test_what_is_declared_as_an_input_is_read(served, triton):
    """Each declared input, sent with its declared datatype and dims, is understood: it is honoured,
    or refused as a value, never as unknown or of a wrong datatype."""
    declared = triton.get_model_metadata("base").inputs
    for one in declared:
        given = triton_client.InferInput(one.name, [1], one.datatype)
        kind = np.object_ if one.datatype == "BYTES" else None
        dtype = kind or triton_client.triton_to_np_dtype(one.datatype)
        given.set_data_from_numpy(np.array([1], dtype=dtype))
        prompt = [] if one.name == "text_input" else inputs("x", max_tokens=None, temperature=None)
        prompt = [p for p in prompt if p.name() != one.name]
        try:
            triton.infer("base", [*prompt, given])
        except InferenceServerException as e:
            assert "unknown" not in e.message(), one.name
            assert "datatype" not in e.message(), one.name


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.get_system_shared_memory_status(),
        lambda c: c.register_system_shared_memory("r", "/etc/passwd", 8),
        lambda c: c.unregister_system_shared_memory("r"),
        lambda c: c.get_cuda_shared_memory_status(),
        lambda c: c.register_cuda_shared_memory("r", b"eA==", 0, 8),
        lambda c: c.unregister_cuda_shared_memory("r"),
        lambda c: c.get_trace_settings(),
        lambda c: c.update_trace_settings(settings={"trace_file": "/tmp/x"}),
        lambda c: c.get_log_settings(),
        lambda c: c.update_log_settings({"log_file": "/tmp/x"}),
    ],
)
def test_what_is_not_offered_is_refused_by_its_name(served, triton, call):
    with pytest.raises(
        InferenceServerException, match=r"^\[StatusCode.UNIMPLEMENTED\] \w+(Memory\w+|Settings?): "
    ):
        call(triton)


def states(triton):
    return {(m.name, m.version): m.state for m in triton.get_model_repository_index().models}


def test_the_repository_lists_base_adapters_and_use_cases_and_loads_and_unloads(served, triton):
    adapters = served.stack.host._serving.model.runtime.adapters
    triton.load_model("base:both")
    assert adapters.info("a").tier is Tier.BANK
    triton.unload_model("base:a")
    assert adapters.info("a").tier is not Tier.BANK
    assert states(triton) == {
        ("base", "1"): "READY",
        ("base:a", "r1"): "UNAVAILABLE",
        ("base:b", "r1"): "READY",
        ("base:both", "1"): "UNAVAILABLE",
    }
    ready = triton._client_stub.RepositoryIndex(
        triton_client.service_pb2.RepositoryIndexRequest(ready=True)
    )
    assert [m.name for m in ready.models] == ["base", "base:b"]
    assert triton.is_model_ready("base:a")  # its next request loads it
    triton.load_model("base:a")
    assert states(triton)["base:a", "r1"] == "READY"
    triton.unload_model("base:both", unload_dependents=True)
    assert states(triton)["base:b", "r1"] == "UNAVAILABLE"
    triton.load_model("base")  # it is loaded: nothing to do


def test_an_adapter_in_use_is_unloading_until_its_last_request_ends(served, triton):
    pause, seen = threading.Event(), threading.Event()
    served.engine.before_step = lambda: seen.wait(0.1) and None  # ten seconds, or until seen
    with streaming(triton) as stream:
        stream.send("base:a", "hello", max_tokens=100)
        stream.next()
        triton.unload_model("base:a")
        assert states(triton)["base:a", "r1"] == "UNLOADING"
        seen.set()
        stream.all()
    for _ in range(6000):
        if states(triton)["base:a", "r1"] == "UNAVAILABLE":
            return
        pause.wait(0.01)
    raise AssertionError(states(triton))


@pytest.mark.parametrize(
    ("call", "status", "named"),
    [
        (lambda c: c.load_model("zzz"), "NOT_FOUND", "zzz"),
        (lambda c: c.load_model("base:../../etc"), "NOT_FOUND", "etc"),
        (lambda c: c.load_model("base:a", config="{}"), "UNIMPLEMENTED", "config"),
        (
            lambda c: c.load_model("base:a", config="{}", files={"file:1/x": b"x"}),
            "UNIMPLEMENTED",
            "parameter",
        ),
        (lambda c: c.unload_model("base"), "FAILED_PRECONDITION", "serves"),
        (lambda c: c.unload_model("ensemble"), "FAILED_PRECONDITION", "serves"),
        (lambda c: c.unload_model("base:both"), "FAILED_PRECONDITION", "unload_dependents"),
        (lambda c: c.unload_model("zzz"), "NOT_FOUND", "zzz"),
    ],
)
def test_loads_and_unloads_are_refused_by_name(served, triton, call, status, named):
    with pytest.raises(InferenceServerException, match=named) as refused:
        call(triton)
    assert refused.value.status() == f"StatusCode.{status}"


def test_statistics_count_each_name_with_its_durations(served, triton):
    for _ in range(3):
        triton.infer("base:a", inputs("hello"))
    triton.infer("ensemble", inputs("hello"))
    with pytest.raises(InferenceServerException):
        triton.infer("base", inputs("x" * 300))
    with streaming(triton) as stream:
        stream.send("base", "hello")
        stream.all()

    def of(name):
        (stats,) = triton.get_inference_statistics(name).model_stats
        assert stats.name == name
        return stats

    adapter = of("base:a")
    assert (adapter.version, adapter.inference_count, adapter.execution_count) == ("r1", 3, 3)
    durations = adapter.inference_stats
    assert (durations.success.count, durations.fail.count) == (3, 0)
    parts = (durations.queue, durations.compute_input, durations.compute_infer)
    assert sum(p.ns for p in parts) == pytest.approx(durations.success.ns, rel=0.01)
    assert durations.compute_infer.ns > 0
    assert adapter.last_inference > 1_600_000_000_000
    assert of("ensemble").inference_count == of("base").inference_count == 2
    assert of("base").inference_stats.fail.count == 1
    assert of("base:b").inference_count == 0
    everything = triton.get_inference_statistics().model_stats
    assert {s.name for s in everything} == {"base", "base:a"}


def health_of(address: str) -> int:
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=60).status


def test_health_tells_of_the_service(served):
    pause = threading.Event()
    for _ in range(6000):
        if health_of(served.address) == health_pb2.HealthCheckResponse.SERVING:
            return
        pause.wait(0.01)
    raise AssertionError("never serving")


def test_a_switch_turns_the_service_off(tmp_path, engines, world):
    with (
        running_stack(tmp_path, engines, kserve=False) as (stack, address),
        triton_client.InferenceServerClient(address) as client,
    ):
        stack.host.switch(world.assignment())
        with pytest.raises(InferenceServerException) as absent:
            client.infer("base", inputs("x"))
        assert absent.value.status() == "StatusCode.UNIMPLEMENTED"
        with pytest.raises(grpc.RpcError):
            health_of(address)


def test_requests_go_on_over_a_switch_of_the_model(served, triton, world):
    assert text_of(triton.infer("base", inputs("hello")))
    served.stack.host.switch(world.assignment("two", "other"))
    with pytest.raises(InferenceServerException) as gone:
        triton.infer("base", inputs("hello"))
    assert gone.value.status() == "StatusCode.NOT_FOUND"
    other = triton.infer("other", inputs("hello"))
    assert other.as_numpy("bundle_digest")[0].decode() == world.bundle("other").digest
    assert text_of(triton.infer("ensemble", inputs("hello"))) == text_of(other)
