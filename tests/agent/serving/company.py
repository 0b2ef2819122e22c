"""Waiting for a server to be rid of a caller, and requests as any KServe client may write them."""

from __future__ import annotations

import threading

from remora_protos.kserve.v2 import grpc_service_pb2 as kserve_pb

LONG = {"max_tokens": 240, "ignore_eos": True, "temperature": 0.0}


def wait_until(true, what: str) -> None:
    pause = threading.Event()
    for _ in range(6000):
        if true():
            return
        pause.wait(0.01)
    raise AssertionError(f"never: {what}")


def nothing_left(stack) -> bool:
    metrics = stack.host.metrics()
    names = ("rows_busy", "queue_depth", "adapter_leases")
    return all(metrics[name] == 0 for name in names)


def slowly(engine) -> None:
    """So that an answer is under way when the test acts."""
    pause = threading.Event()
    engine.before_step = lambda: pause.wait(0.005) and None


def kserve_request(
    text: str, request_id: str = "", **options: object
) -> kserve_pb.ModelInferRequest:
    made = kserve_pb.ModelInferRequest(model_name="base", id=request_id)
    kinds = {bool: ("BOOL", "bool"), int: ("INT32", "int"), float: ("FP32", "fp32")}
    values = {"text_input": text, "stream": True, **options}
    for name, value in values.items():
        datatype, field = kinds.get(type(value), ("BYTES", "bytes"))
        tensor = made.inputs.add(name=name, datatype=datatype, shape=[1])
        content = value.encode() if isinstance(value, str) else value
        getattr(tensor.contents, f"{field}_contents").append(content)
    return made
