"""Every unary call of the client as a value: where it goes, what it sends, how its reply reads.

The sync and the async client carry the same operations out. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from remora_agent.client import requests, results
from remora_agent.client.requests import AdapterChoice, EmbedInputs, Options, Prompt, sendable
from remora_agent.client.results import (
    Adapter,
    Adapters,
    Alias,
    Capacity,
    Embeddings,
    EngineStatus,
    Result,
    Tokens,
    UseCase,
    UseCaseCounts,
)
from remora_contract.errors import RequestInvalid
from remora_protos.inference.v1 import inference_pb2 as pb

T = TypeVar("T")
Service = Literal["Inference", "Adapters", "UseCases", "EngineService"]
Pooling = Literal["last", "mean"]
UnloadMode = Literal["graceful", "cancel", "refuse_if_busy"]
_UNLOAD = {
    "graceful": pb.UNLOAD_MODE_GRACEFUL,
    "cancel": pb.UNLOAD_MODE_CANCEL,
    "refuse_if_busy": pb.UNLOAD_MODE_REFUSE_IF_BUSY,
}


@dataclass(frozen=True)
class Operation(Generic[T]):
    service: Service
    method: str
    request: Any
    reply: Callable[[Any], T]


def generate(prompt: Prompt, options: Options) -> Operation[Result]:
    request = requests.generate_request(prompt, options)
    return Operation("Inference", "GenerateUnary", request, results.result)


@sendable
def embed(
    inputs: EmbedInputs,
    pooling: Pooling,
    normalize: bool,
    adapter: AdapterChoice,
    use_case: str | None,
) -> Operation[Embeddings]:
    request = requests.embed_request(inputs, pooling, normalize, adapter, use_case)
    return Operation("Inference", "Embed", request, results.embeddings)


@sendable
def cancel(request_id: str) -> Operation[bool]:
    request = pb.CancelRequest(request_id=request_id)
    return Operation("Inference", "Cancel", request, lambda r: bool(r.found))


@sendable
def tokenize(prompt: Prompt, add_special_tokens: bool | None) -> Operation[Tokens]:
    """Raises RequestInvalid for token ids: they are tokens already."""
    request = pb.TokenizeRequest()
    if isinstance(prompt, str):
        request.text = prompt
        if add_special_tokens is not None:
            request.add_special_tokens = add_special_tokens
    elif prompt and isinstance(prompt[0], Mapping):
        request.chat.CopyFrom(requests.chat(prompt, {}))
    else:
        raise RequestInvalid("tokenize takes text or chat messages")
    return Operation("Inference", "Tokenize", request, results.tokens)


@sendable
def detokenize(ids: Sequence[int], keep_special_tokens: bool) -> Operation[str]:
    request = pb.DetokenizeRequest(token_ids=ids, keep_special_tokens=keep_special_tokens)
    return Operation("Inference", "Detokenize", request, lambda r: str(r.text))


@sendable
def register(name: str, path: str, revision: str, set_alias: bool) -> Operation[Adapter]:
    request = pb.RegisterAdapterRequest(
        name=name, path=path, revision=revision, set_alias=set_alias
    )
    return Operation("Adapters", "Register", request, results.adapter)


@sendable
def load(name: str, revision: str) -> Operation[Adapter]:
    request = pb.LoadAdapterRequest(name=name, revision=revision)
    return Operation("Adapters", "Load", request, results.adapter)


@sendable
def unload(name: str, revision: str, mode: UnloadMode, forget: bool) -> Operation[Adapter]:
    if mode not in _UNLOAD:
        raise RequestInvalid(f"mode {mode!r} is not one of {', '.join(_UNLOAD)}")
    request = pb.UnloadAdapterRequest(
        name=name, revision=revision, mode=_UNLOAD[mode], forget=forget
    )
    return Operation("Adapters", "Unload", request, results.adapter)


@sendable
def set_alias(name: str, revision: str, expected_epoch: int | None) -> Operation[Alias]:
    request = pb.SetAliasRequest(name=name, revision=revision)
    if expected_epoch is not None:
        request.expected_epoch = expected_epoch
    return Operation("Adapters", "SetAlias", request, results.alias)


@sendable
def pin(name: str, revision: str, pinned: bool) -> Operation[Adapter]:
    request = pb.PinAdapterRequest(name=name, revision=revision, pinned=pinned)
    return Operation("Adapters", "Pin", request, results.adapter)


def list_adapters() -> Operation[Adapters]:
    return Operation("Adapters", "List", pb.ListAdaptersRequest(), results.adapters)


@sendable
def capacity(rank: int) -> Operation[Capacity]:
    return Operation("Adapters", "Capacity", pb.CapacityRequest(rank=rank), results.capacity)


@sendable
def set_use_case(name: str, adapters: Mapping[str, float]) -> Operation[UseCase]:
    use_case = pb.UseCase(name=name, adapters=requests.mix(adapters))
    request = pb.SetUseCaseRequest(use_case=use_case)
    return Operation("UseCases", "Set", request, results.use_case)


@sendable
def delete_use_case(name: str) -> Operation[bool]:
    request = pb.DeleteUseCaseRequest(name=name)
    return Operation("UseCases", "Delete", request, lambda r: bool(r.found))


def list_use_cases() -> Operation[tuple[UseCase, ...]]:
    return Operation(
        "UseCases",
        "List",
        pb.ListUseCasesRequest(),
        lambda r: tuple(results.use_case(u) for u in r.use_cases),
    )


def use_case_counts() -> Operation[tuple[UseCaseCounts, ...]]:
    return Operation(
        "UseCases",
        "List",
        pb.ListUseCasesRequest(),
        lambda r: tuple(results.use_case_counts(c) for c in r.counts),
    )


def engine_status() -> Operation[EngineStatus]:
    return Operation("EngineService", "Status", pb.EngineStatusRequest(), results.engine_status)
