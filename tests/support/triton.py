"""Requests as applications make them with the unchanged tritonclient."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tritonclient.grpc as triton

DATATYPES = {
    "text_input": "BYTES",
    "stop_words": "BYTES",
    "bad_words": "BYTES",
    "adapter": "BYTES",
    "lora_name": "BYTES",
    "use_case": "BYTES",
    "sampling_parameters": "BYTES",
    "guided_decoding_guide_type": "BYTES",
    "guided_decoding_guide": "BYTES",
    "seed": "UINT64",
    "lora_task_id": "UINT64",
    "temperature": "FP32",
    "top_p": "FP32",
    "min_p": "FP32",
    "repetition_penalty": "FP32",
    "presence_penalty": "FP32",
    "frequency_penalty": "FP32",
    "length_penalty": "FP32",
    "adapter_weight": "FP32",
}
OPTIONS = {"max_tokens": 8, "ignore_eos": True, "temperature": 0.0}
PAUSE_S = 30


def tensor(name: str, value: Any, *, datatype: str | None = None, batched: bool = False) -> Any:
    """An InferInput in raw form. `value`: one value or a list; shape [n], or [1, n] if batched."""
    values = value if isinstance(value, list) else [value]
    datatype = datatype or DATATYPES.get(name) or _datatype(values[0])
    shape = [1, len(values)] if batched else [len(values)]
    made = triton.InferInput(name, shape, datatype)
    if datatype == "BYTES":
        values = [v.encode() if isinstance(v, str) else v for v in values]
    made.set_data_from_numpy(np.array(values, dtype=triton_dtype(datatype)).reshape(shape))
    return made


def triton_dtype(datatype: str) -> Any:
    from tritonclient.utils import triton_to_np_dtype

    return triton_to_np_dtype(datatype)


def inputs(text: Any, *, batched: bool = False, **given: Any) -> list[Any]:
    """Tensors of a prompt and options; OPTIONS where `given` does not say."""
    options = {"text_input": text, **OPTIONS, **given}
    return [tensor(n, v, batched=batched) for n, v in options.items() if v is not None]


def outputs(*names: str) -> list[Any]:
    return [triton.InferRequestedOutput(name) for name in names]


def text_of(result: Any) -> str:
    return result.as_numpy("text_output")[0].decode()


def is_final(result: Any) -> bool:
    return result.get_response().parameters["triton_final_response"].bool_param


class Stream:
    """One ModelStreamInfer call. Responses come in the order in which they were sent."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._heard: queue.Queue[tuple[Any, Any]] = queue.Queue()

    def send(self, model: str, text: Any, request_id: str = "", **options: Any) -> None:
        """`parameters`, `outputs`, `enable_empty_final_response`, `timeout` go to the call; the
        rest are inputs."""
        call = {
            name: options.pop(name)
            for name in ("parameters", "outputs", "enable_empty_final_response", "timeout")
            if name in options
        }
        given = inputs(text, **{"stream": True, **options})
        self._client.async_stream_infer(model, given, request_id=request_id, **call)

    def next(self) -> Any:
        """A result; raises the error of an in-band one."""
        result, error = self._heard.get(timeout=PAUSE_S)
        if error is not None:
            raise error
        return result

    def all(self) -> list[Any]:
        """Until the final response of the one request."""
        results = [self.next()]
        while not is_final(results[-1]):
            results.append(self.next())
        return results

    def by_id(self, count: int) -> dict[str, list[Any]]:
        """All results of `count` requests."""
        found: dict[str, list[Any]] = {}
        ended = 0
        while ended < count:
            result = self.next()
            found.setdefault(result.get_response().id, []).append(result)
            ended += is_final(result)
        return found

    def hear(self, result: Any, error: Any) -> None:
        self._heard.put((result, error))


@contextmanager
def streaming(client: Any, **options: Any) -> Iterator[Stream]:
    stream = Stream(client)
    client.start_stream(stream.hear, **options)
    try:
        yield stream
    finally:
        client.stop_stream(cancel_requests=True)


def _datatype(value: Any) -> str:
    if isinstance(value, bool):
        return "BOOL"
    return {int: "INT32", float: "FP32"}.get(type(value), "BYTES")
