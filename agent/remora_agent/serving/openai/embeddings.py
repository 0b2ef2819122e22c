"""POST /v1/embeddings. The request is read and checked; vectors are not computed yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from remora_agent.serving.call import TextPrompt, TokenPrompt
from remora_agent.serving.limits import check_prompt
from remora_agent.serving.openai.body import json_object
from remora_agent.serving.openai.completion_request import prompts_of
from remora_agent.serving.openai.errors import EndpointMissing, FieldInvalid
from remora_agent.serving.openai.exchange import read_body
from remora_agent.serving.openai.fields import Fields
from remora_agent.serving.openai.generating import Generator
from remora_agent.serving.openai.naming import ModelChoice, model_choice

MAX_INPUTS = 128


@dataclass(frozen=True)
class EmbeddingRequest:
    choice: ModelChoice
    inputs: tuple[TextPrompt | TokenPrompt, ...]
    base64: bool  # little-endian float32 instead of numbers
    client: str


def embedding_request(body: Mapping[str, Any]) -> EmbeddingRequest:
    """Raises FieldInvalid, FieldUnsupported."""
    fields = Fields(body)
    choice = model_choice(fields)
    inputs = prompts_of(fields, "input", True)
    if len(inputs) > MAX_INPUTS:
        raise FieldInvalid(f"input: at most {MAX_INPUTS} inputs, not {len(inputs)}", "input")
    form = fields.text("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise fields.wrong("encoding_format", "float or base64", form)
    client = fields.text("user", 256) or ""
    fields.refuse({"dimensions": ((), "vectors have the model's width")})
    fields.done()
    for prompt in inputs:
        check_prompt(prompt)
    return EmbeddingRequest(choice, tuple(inputs), form == "base64", client)


class Embeddings:
    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    async def embed(self, request: Request) -> Response:
        body = await read_body(request)
        await self._generator.work(lambda: embedding_request(json_object(body)))
        raise EndpointMissing("/v1/embeddings is not implemented in this version")
