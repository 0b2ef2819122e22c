"""A request's events as its responses. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from remora_agent.runtime.api import Delta, Finished, FinishReason
from remora_agent.serving.event_stream import StreamEvent
from remora_agent.serving.kserve.outputs import (
    CUM_LOG_PROBS,
    CUMULATIVE_LOGPROB,
    NUM_OUTPUT_TOKENS,
    OUTPUT_LOG_PROBS,
    OUTPUTS,
    TEXT_OUTPUT,
)
from remora_agent.serving.kserve.request import Inference
from remora_agent.serving.kserve.tensors import add_output
from remora_contract.errors import Cancelled, RemoraError
from remora_protos.kserve.v2 import grpc_service_pb2 as pb

FINAL = "triton_final_response"


class Responses:
    """With `stream` each piece of text is a response and the last one has the counts; without,
    there is one response."""

    def __init__(self, inference: Inference) -> None:
        self.version = inference.model_version  # until it is known which one answers
        self._inference = inference
        self._text: list[str] = []
        self._tokens = 0  # of the text not yet sent
        self._logprobs: list[float] = []  # of these tokens, where they are scored
        self._cumulative = 0.0  # of all tokens so far
        self._sent_tokens = 0

    def of(self, event: StreamEvent) -> Iterator[pb.ModelInferResponse]:
        """Raises Cancelled when somebody else ended the request."""
        if isinstance(event, Delta):
            self._text.append(event.text)
            self._tokens += len(event.token_ids)
            self._logprobs.extend(scored.logprob for scored in event.logprobs)
            self._cumulative += sum(scored.logprob for scored in event.logprobs)
            if self._inference.stream and event.text:
                yield self._response({NUM_OUTPUT_TOKENS: [self._tokens]})
                self._sent_tokens += self._tokens
                self._tokens = 0
        elif isinstance(event, Finished):
            if event.reason is FinishReason.CANCELLED:
                raise Cancelled("the request was cancelled; its answer is incomplete")
            yield self._response(self._ending(event))

    def _response(self, values: Mapping[str, Sequence[Any]]) -> pb.ModelInferResponse:
        asked = self._inference
        response = pb.ModelInferResponse(
            model_name=asked.model_name, model_version=self.version, id=asked.client_id
        )
        values = {
            TEXT_OUTPUT: ["".join(self._text)],
            OUTPUT_LOG_PROBS: list(self._logprobs),
            CUM_LOG_PROBS: [self._cumulative],
            CUMULATIVE_LOGPROB: [self._cumulative],
            **values,
        }
        self._text.clear()
        self._logprobs.clear()
        for name in asked.outputs:
            if name in values:
                add_output(response, name, OUTPUTS[name].datatype, values[name])
        return response

    def _ending(self, event: Finished) -> dict[str, Sequence[Any]]:
        usage, timings, provenance = event.usage, event.timings, event.provenance
        return {
            "finish_reason": [event.reason.value],
            "num_input_tokens": [usage.prompt_tokens],
            NUM_OUTPUT_TOKENS: [usage.completion_tokens - self._sent_tokens],
            "num_cached_tokens": [usage.cached_tokens],
            "queue_s": [timings.queue_s],
            "prefill_s": [timings.prefill_s],
            "decode_s": [timings.decode_s],
            "time_to_first_token_s": [timings.time_to_first_token_s],
            "bundle_digest": [provenance.bundle_digest],
            "adapter_digests": [a.digest for a in provenance.adapters],
            "experiment": [] if provenance.arm is None else [provenance.arm.experiment],
            "arm": [] if provenance.arm is None else [provenance.arm.name],
        }


def without_outputs(response: pb.ModelInferResponse) -> pb.ModelInferResponse:
    return pb.ModelInferResponse(
        model_name=response.model_name, model_version=response.model_version, id=response.id
    )


def streamed(response: pb.ModelInferResponse, *, final: bool) -> pb.ModelStreamInferResponse:
    response.parameters[FINAL].bool_param = final
    return pb.ModelStreamInferResponse(infer_response=response)


def failed(request: pb.ModelInferRequest, error: RemoraError) -> pb.ModelStreamInferResponse:
    """The last response of a request that failed; the stream goes on. Its id says whose it is."""
    response = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
    made = streamed(response, final=True)
    made.error_message = f"{error.code}: {error}"
    return made
