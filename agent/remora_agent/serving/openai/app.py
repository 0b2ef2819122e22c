"""The endpoints put together: routes, the guard before them, one place where errors are told."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from remora_agent.serving.driver import RequestDriver
from remora_agent.serving.openai.completions import Completions
from remora_agent.serving.openai.embeddings import Embeddings
from remora_agent.serving.openai.errors import WrongMethod
from remora_agent.serving.openai.exchange import refusal
from remora_agent.serving.openai.generating import Generator
from remora_agent.serving.openai.guard import Guard
from remora_agent.serving.openai.keys import ApiKeys
from remora_agent.serving.openai.lora import LoraAdapters
from remora_agent.serving.openai.models import model_list, model_object
from remora_agent.serving.openai.texts import Texts
from remora_agent.serving.router import Router
from remora_agent.serving.served_model import ServedModel
from remora_contract.errors import InternalFault, NotFound, RemoraError, Unavailable

MAX_REQUESTS = 1024  # at a time; more are refused


@dataclass(frozen=True)
class AppOptions:
    keys: ApiKeys = field(default_factory=ApiKeys)
    adapter_directory: Path | None = None
    max_requests: int = MAX_REQUESTS


def make_app(
    router: Router[ServedModel],
    workers: ThreadPoolExecutor,
    options: AppOptions,
    new_id: Callable[[], str],
    unix_now: Callable[[], float],
) -> ASGIApp:
    generator = Generator(router, workers, new_id)
    completions = Completions(generator, new_id, unix_now)
    texts, lora = Texts(generator), LoraAdapters(generator, options.adapter_directory)
    embeddings = Embeddings(RequestDriver(router, workers, new_id))
    models = Models(router, int(unix_now()))
    routes = [
        Route("/health", models.health, methods=["GET"]),
        Route("/version", models.version, methods=["GET"]),
        Route("/v1/models", models.list, methods=["GET"]),
        Route("/v1/models/{name:path}", models.get, methods=["GET"]),
        Route("/v1/chat/completions", completions.chat, methods=["POST"]),
        Route("/v1/completions", completions.complete, methods=["POST"]),
        Route("/v1/embeddings", embeddings.embed, methods=["POST"]),
        Route("/tokenize", texts.tokenize, methods=["POST"]),
        Route("/detokenize", texts.detokenize, methods=["POST"]),
        Route("/v1/load_lora_adapter", lora.load, methods=["POST"]),
        Route("/v1/unload_lora_adapter", lora.unload, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {
        RemoraError: _refuse,
        HTTPException: _no_route,
        Exception: _fault,
    }
    return Guard(
        Starlette(routes=routes, exception_handlers=handlers), options.keys, options.max_requests
    )


class Models:
    def __init__(self, router: Router[ServedModel], created: int) -> None:
        self._router, self._created = router, created

    async def health(self, request: Request) -> Response:
        """200 while calls are let in."""
        state = self._router.state
        if state != "serving":
            raise Unavailable(f"this agent is {state}")
        return JSONResponse({"status": state})

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": metadata.version("remora")})

    async def list(self, request: Request) -> Response:
        async with self._router.entering() as model:
            return JSONResponse(model_list(*_facts(model), self._created))

    async def get(self, request: Request) -> Response:
        async with self._router.entering() as model:
            return JSONResponse(
                model_object(request.path_params["name"], *_facts(model), self._created)
            )


def _facts(model: ServedModel) -> tuple[str, Any, int]:
    runtime = model.runtime
    context = runtime.status().context_tokens
    return runtime.bundle.source.name, runtime.adapters.directory, context


async def _refuse(request: Request, error: RemoraError) -> Response:
    return refusal(error)


async def _no_route(request: Request, error: HTTPException) -> Response:
    if error.status_code == 405:
        return refusal(WrongMethod(f"{request.url.path} does not take {request.method}"))
    return refusal(NotFound(f"there is no {request.method} {request.url.path[:200]}"))


async def _fault(request: Request, error: Exception) -> Response:
    """A bug: its traceback goes to the log, not to the caller."""
    return refusal(InternalFault("the agent failed on this request; its log says why"))
