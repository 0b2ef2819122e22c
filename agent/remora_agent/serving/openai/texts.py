"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from remora_agent.serving.call import PromptInput, TextPrompt
from remora_agent.serving.limits import check_prompt
from remora_agent.serving.openai.body import json_object
from remora_agent.serving.openai.chat_request import chat_prompt
from remora_agent.serving.openai.errors import FieldInvalid
from remora_agent.serving.openai.exchange import read_body
from remora_agent.serving.openai.fields import Fields, one_of
from remora_agent.serving.openai.generating import Generator
from remora_agent.serving.openai.logprobs import token_text
from remora_agent.serving.openai.naming import meaning_of
from remora_agent.serving.served_model import ServedModel

_MAX_MODEL_CHARS = 512


class Texts:
    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    async def tokenize(self, request: Request) -> Response:
        body = await read_body(request)
        fields = Fields(await self._generator.work(lambda: json_object(body)))
        name = fields.text("model", _MAX_MODEL_CHARS)
        prompt = _prompt(fields)
        spelled = fields.flag("return_token_strs") or False
        fields.done()
        async with self._generator.router.entering() as model:
            _check_model(name, model)
            ids = (await self._generator.work(lambda: model.encode(prompt))).token_ids
        made: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": model.runtime.status().context_tokens,
            "tokens": list(ids),
        }
        if spelled:
            made["token_strs"] = [token_text(model.runtime.text.bytes_of_token(i)) for i in ids]
        return JSONResponse(made)

    async def detokenize(self, request: Request) -> Response:
        body = await read_body(request)
        fields = Fields(await self._generator.work(lambda: json_object(body)))
        name, ids = fields.text("model", _MAX_MODEL_CHARS), fields.ids("tokens")
        fields.done()
        async with self._generator.router.entering() as model:
            _check_model(name, model)
            text = await self._generator.work(
                lambda: model.runtime.text.decode(ids, keep_special_tokens=True)
            )
        return JSONResponse({"prompt": text})


def _prompt(fields: Fields) -> PromptInput:
    """Text, or a chat with all that goes through its template."""
    given, prompt = one_of(fields, ("prompt", "messages")), fields.text("prompt")
    if given is None:
        raise FieldInvalid("give prompt or messages", "prompt")
    special = fields.flag("add_special_tokens")
    if prompt is not None:
        return check_prompt(TextPrompt(prompt, True if special is None else special))
    if special:
        raise FieldInvalid("add_special_tokens goes with prompt", "add_special_tokens")
    return check_prompt(chat_prompt(fields))


def _check_model(name: str | None, model: ServedModel) -> None:
    """Raises ModelUnknown. All of a model's names share its tokenizer."""
    if name is not None:
        runtime = model.runtime
        meaning_of(name, runtime.bundle.source.name, runtime.adapters.directory)
