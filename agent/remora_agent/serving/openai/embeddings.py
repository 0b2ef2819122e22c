"""POST /v1/embeddings: the request read strictly, its vectors as OpenAI's objects."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from remora_agent.runtime.api import Share
from remora_agent.runtime.embedding import Embedded, Pooling
from remora_agent.serving.callers import TRACE_PARENT
from remora_agent.serving.driver import RequestDriver
from remora_agent.serving.embedding import EmbedCall, check_embed
from remora_agent.serving.openai.body import json_object
from remora_agent.serving.openai.completion_request import prompts_of
from remora_agent.serving.openai.exchange import attended, read_body, share_of_caller
from remora_agent.serving.openai.fields import Fields
from remora_agent.serving.openai.naming import ModelChoice, model_choice, select
from remora_agent.serving.openai.options import share_of
from remora_agent.serving.served_model import ServedModel

_POOLING = {p.value: p for p in Pooling}


@dataclass(frozen=True)
class EmbeddingRequest:
    choice: ModelChoice
    call: EmbedCall  # adapters not settled yet
    base64: bool  # little-endian float32 instead of numbers


def embedding_request(body: Mapping[str, Any]) -> EmbeddingRequest:
    """Raises FieldInvalid, FieldUnsupported, and what `check_embed` raises."""
    fields = Fields(body)
    choice = model_choice(fields)
    special = fields.flag("add_special_tokens")
    inputs = prompts_of(fields, "input", True if special is None else special)
    form = fields.text("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise fields.wrong("encoding_format", "float or base64", form)
    pooling = fields.text("pooling") or Pooling.LAST.value
    if pooling not in _POOLING:
        raise fields.wrong("pooling", " or ".join(_POOLING), pooling)
    normalize = fields.flag("normalize")
    share: Share = share_of(fields)
    fields.refuse({"dimensions": ((), "vectors have the model's width")})
    fields.done()
    call = EmbedCall(
        inputs=tuple(inputs),
        pooling=_POOLING[pooling],
        normalize=True if normalize is None else normalize,
        share=share,
    )
    return EmbeddingRequest(choice, check_embed(call), form == "base64")


class Embeddings:
    def __init__(self, driver: RequestDriver) -> None:
        self._driver = driver

    async def embed(self, request: Request) -> Response:
        body = await read_body(request)
        wanted: EmbeddingRequest = await self._driver.work(_read, body)
        call = replace(
            wanted.call,
            trace_parent=request.headers.get(TRACE_PARENT, ""),
            share=share_of_caller(wanted.call.share, request),
        )

        def settle(model: ServedModel, call: EmbedCall) -> EmbedCall:
            runtime = model.runtime
            name, directory = runtime.bundle.source.name, runtime.adapters.directory
            return replace(call, selection=select(wanted.choice, name, directory))

        found = await attended(request.receive, self._driver.embed(call, None, settle))
        return JSONResponse(embedding_list(found, wanted))


def _read(body: bytes) -> EmbeddingRequest:
    return embedding_request(json_object(body))


def embedding_list(found: Embedded, wanted: EmbeddingRequest) -> dict[str, Any]:
    tokens = sum(found.prompt_tokens)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": _written(vector, wanted.base64)}
            for i, vector in enumerate(found.vectors)
        ],
        "model": wanted.choice.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _written(vector: Any, as_base64: bool) -> str | list[float]:
    """`vector`: [hidden] float32."""
    if as_base64:
        return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
    numbers: list[float] = np.asarray(vector, np.float32).tolist()
    return numbers
