"""remora.inference.v1.Inference: generation and tokenisation for the model that serves.

A caller that goes away, cancels or runs out of time takes its request with it.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import Any, TypeVar

from remora_agent.serving import embedding_wire, wire
from remora_agent.serving.callers import with_caller
from remora_agent.serving.collected import Collected
from remora_agent.serving.driver import RequestDriver
from remora_agent.serving.embedding import EmbedCall
from remora_agent.serving.limits import MAX_MESSAGE_BYTES
from remora_agent.serving.router import Router
from remora_agent.serving.rpc_errors import translated
from remora_agent.serving.served_model import ServedModel
from remora_agent.serving.writing import STALL_S, write
from remora_contract.errors import RequestInvalid
from remora_protos.inference.v1 import inference_pb2 as pb
from remora_protos.inference.v1 import inference_pb2_grpc as rpc

R = TypeVar("R", pb.TokenizeResponse, pb.DetokenizeResponse, pb.GenerateResponse)
_VECTOR_BYTES = 32  # of a message, beside the numbers of a vector
_PROVENANCE_BYTES = 64 << 10  # the same, for the largest mix


class InferenceService(rpc.InferenceServicer):
    def __init__(
        self, router: Router[ServedModel], driver: RequestDriver, stall_s: float = STALL_S
    ) -> None:
        """A stream of which nothing is read for `stall_s` ends."""
        self._router = router
        self._driver = driver
        self._stall_s = stall_s

    @translated
    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        call = with_caller(wire.generate_call(request), context)
        async with aclosing(self._driver.answers(call, context.time_remaining())) as answers:
            async for choice, event in answers:
                await write(context, wire.event(event, choice), self._stall_s)

    @translated
    async def GenerateUnary(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        call = with_caller(wire.generate_call(request), context)
        collected = [Collected() for _ in range(call.n)]
        async with aclosing(self._driver.answers(call, context.time_remaining())) as answers:
            async for choice, event in answers:
                collected[choice].add(event)
        first, *more = [c.response() for c in collected]
        first.more.extend(more)
        return _sendable(first, "read the answer as a stream, or ask for fewer logprobs")

    @translated
    async def Cancel(self, request: pb.CancelRequest, context: Any) -> pb.CancelResponse:
        wire.refuse_unknown_fields(request)
        return pb.CancelResponse(found=self._driver.cancel(request.request_id))

    @translated
    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        prompt = wire.tokenize_prompt(request)
        async with self._router.entering() as model:
            encoded = await self._driver.work(model.encode, prompt)
        return _sendable(pb.TokenizeResponse(token_ids=encoded.token_ids, rendered=encoded.text))

    @translated
    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: Any
    ) -> pb.DetokenizeResponse:
        wire.refuse_unknown_fields(request)
        async with self._router.entering() as model:
            text = await self._driver.work(
                lambda ids: model.runtime.text.decode(
                    ids, keep_special_tokens=request.keep_special_tokens
                ),
                list(request.token_ids),
            )
        return _sendable(pb.DetokenizeResponse(text=text))

    @translated
    async def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        call = with_caller(embedding_wire.embed_call(request), context)
        found = await self._driver.embed(call, context.time_remaining(), _fitting)
        return embedding_wire.embed_response(found)


def _fitting(model: ServedModel, call: EmbedCall) -> EmbedCall:
    """Raises RequestInvalid where the vectors would not fit one message."""
    each = 4 * model.runtime.bundle.decoder.hidden + _VECTOR_BYTES
    most = (MAX_MESSAGE_BYTES - _PROVENANCE_BYTES) // each
    if len(call.inputs) > most:
        raise RequestInvalid(f"inputs: at most {most} vectors of this model fit a message")
    return call


def _sendable(response: R, advice: str = "send the input in parts") -> R:
    """Raises RequestInvalid where the answer is longer than a message may be."""
    if response.ByteSize() > MAX_MESSAGE_BYTES:
        raise RequestInvalid(
            f"the answer has {response.ByteSize()} bytes, a message {MAX_MESSAGE_BYTES} at most; "
            f"{advice}"
        )
    return response
