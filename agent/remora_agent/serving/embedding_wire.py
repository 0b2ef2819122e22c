"""remora.inference.v1 messages <-> the agent's own words, for embeddings. Pure."""

from __future__ import annotations

from remora_agent.runtime.embedding import Embedded, Pooling
from remora_agent.serving.call import AdapterSelection, TextPrompt, TokenPrompt, UseCaseRef
from remora_agent.serving.embedding import EmbedCall, check_embed
from remora_agent.serving.wire import adapter_ref, provenance, refuse_unknown_fields
from remora_contract.errors import RequestInvalid
from remora_protos.inference.v1 import inference_pb2 as pb

_POOLING = {
    pb.POOLING_UNSPECIFIED: Pooling.LAST,
    pb.POOLING_LAST: Pooling.LAST,
    pb.POOLING_MEAN: Pooling.MEAN,
}


def embed_call(request: pb.EmbedRequest) -> EmbedCall:
    """Raises RequestInvalid, DocumentInvalid (a name), Unsupported (an unknown field)."""
    refuse_unknown_fields(request)
    if request.pooling not in _POOLING:
        raise RequestInvalid(f"pooling: {request.pooling} is none that this agent knows")
    return check_embed(
        EmbedCall(
            inputs=tuple(_input(i, message) for i, message in enumerate(request.inputs)),
            pooling=_POOLING[request.pooling],
            normalize=request.normalize if request.HasField("normalize") else True,
            selection=_selection(request),
        )
    )


def embed_response(found: Embedded) -> pb.EmbedResponse:
    pairs = zip(found.vectors, found.prompt_tokens, strict=True)
    return pb.EmbedResponse(
        embeddings=[pb.Embedding(values=vector, prompt_tokens=count) for vector, count in pairs],
        provenance=provenance(found.provenance),
    )


def _input(index: int, message: pb.EmbedInput) -> TextPrompt | TokenPrompt:
    kind = message.WhichOneof("input")
    if kind is None:
        raise RequestInvalid(f"inputs[{index}]: set one of text, token_ids")
    if kind == "text":
        return TextPrompt(message.text)
    return TokenPrompt(tuple(message.token_ids.ids))


def _selection(request: pb.EmbedRequest) -> AdapterSelection:
    kind = request.WhichOneof("adapter_selection")
    if kind == "use_case":
        return UseCaseRef(request.use_case)
    if kind is None:
        return ()
    if not request.adapters.adapters:
        raise RequestInvalid("adapters: the mix is empty; name an adapter or select none")
    return tuple(adapter_ref(a) for a in request.adapters.adapters)
