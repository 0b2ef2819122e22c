"""One answer's events, joined into the message of a unary call. Pure."""

from __future__ import annotations

from remora_agent.runtime.api import Accepted, Delta, PromptScored
from remora_agent.serving import wire
from remora_agent.serving.event_stream import StreamEvent
from remora_protos.inference.v1 import inference_pb2 as pb


class Collected:
    def __init__(self) -> None:
        self._response = pb.GenerateResponse()
        self._texts: list[str] = []

    def add(self, event: StreamEvent) -> None:
        response = self._response
        if isinstance(event, Accepted):
            response.request_id = event.request_id
        elif isinstance(event, PromptScored):
            response.prompt_logprobs.extend(map(wire.token_logprob, event.logprobs))
        elif isinstance(event, Delta):
            self._texts.append(event.text)
            response.token_ids.extend(event.token_ids)
            response.logprobs.extend(map(wire.token_logprob, event.logprobs))
        else:
            response.finished.CopyFrom(wire.finished(event))

    def response(self) -> pb.GenerateResponse:
        """Once the answer has ended."""
        self._response.text = "".join(self._texts)
        return self._response
