"""The asyncio client: the same calls as `Client`, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from remora_agent.client import operations
from remora_agent.client.connection import Retry, attempts, raise_from, stubs, target
from remora_agent.client.operations import Operation, Pooling, UnloadMode
from remora_agent.client.requests import (
    AdapterChoice,
    EmbedInputs,
    Messages,
    Options,
    Prompt,
    generate_request,
    one_input,
)
from remora_agent.client.results import (
    Adapter,
    Adapters,
    Alias,
    Capacity,
    Delta,
    Embeddings,
    EngineStatus,
    Result,
    Tokens,
    UseCase,
    UseCaseCounts,
)
from remora_agent.client.transcript import Transcript
from remora_agent.serving.address import DEFAULT_LISTEN
from remora_agent.serving.tls import ClientTls
from remora_contract.errors import Cancelled, InternalFault

if TYPE_CHECKING:
    from typing_extensions import Unpack

T = TypeVar("T")


class AsyncStream(AsyncIterator[Delta]):
    """Deltas as they are produced. `result` stands once it has ended; `cancel` ends it early."""

    def __init__(self, call: Any, first: Any, choices: int = 1) -> None:
        self._call = call
        self._given_up = False
        self._transcript = Transcript(choices)
        self._transcript.add(first)

    @property
    def request_id(self) -> str:
        return self._transcript.request_id

    @property
    def result(self) -> Result:
        """Raises Refused while the stream runs."""
        return self._transcript.result()

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Delta:
        while not self._transcript.finished:
            try:
                delta = self._transcript.add(await self._read())
            except grpc.RpcError as e:
                raise_from(e)
            if delta is not None:
                return delta
        raise StopAsyncIteration

    def cancel(self) -> None:
        """Gives up: the agent frees the row and the stream raises Cancelled."""
        self._given_up = True
        self._call.cancel()

    async def _read(self) -> Any:
        try:
            return await self._call.read()
        except asyncio.CancelledError as e:
            # grpc.aio reports a cancelled call like a cancelled task; only the latter passes on.
            if self._given_up:
                raise Cancelled(f"request {self.request_id} was cancelled by its caller") from e
            raise

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._call.cancel()  # no effect once it has ended


class AsyncClient:
    """Raises the errors of `remora_contract.errors`.

    `address`: HOST:PORT or unix:/path; other machines need `tls`. `timeout_s` bounds every call
    (None: no limit) and becomes the request's deadline on the agent.
    """

    def __init__(
        self,
        address: str = DEFAULT_LISTEN,
        *,
        tls: ClientTls | None = None,
        timeout_s: float | None = None,
        retry: Retry | None = None,
    ) -> None:
        to = target(address, tls)
        self._channel = (
            grpc.aio.insecure_channel(to.name(), to.options)
            if to.credentials is None
            else grpc.aio.secure_channel(to.name(), to.credentials, to.options)
        )
        self._stubs = stubs(self._channel)
        self._timeout_s = timeout_s
        self._retry = retry

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def generate(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """Give `messages` (through the chat template) or `prompt` (text or token ids, no template).
        See `Options` for the rest."""
        return await self._unary(operations.generate(one_input(prompt, messages), options))

    async def stream(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        **options: Unpack[Options],
    ) -> AsyncStream:
        """Like `generate`, as the text is produced. Returns once the request is admitted."""
        request = generate_request(one_input(prompt, messages), options)

        async def start() -> AsyncStream:
            call = self._stubs["Inference"].Generate(request, timeout=self._timeout_s)
            return AsyncStream(call, await call.read(), request.n)

        return await self._attempt(start)

    async def embed(
        self,
        inputs: EmbedInputs,
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        adapter: AdapterChoice = None,
        use_case: str | None = None,
    ) -> Embeddings:
        """One vector for each input: a text, token ids, or a list of either. `pooling` takes the
        last token's state or the mean of all; `normalize` makes its length 1."""
        operation = operations.embed(inputs, pooling, normalize, adapter, use_case)
        return await self._unary(operation)

    async def cancel(self, request_id: str) -> bool:
        """False when no such request runs."""
        return await self._unary(operations.cancel(request_id))

    async def tokenize(self, prompt: Prompt, add_special_tokens: bool | None = None) -> Tokens:
        return await self._unary(operations.tokenize(prompt, add_special_tokens))

    async def detokenize(self, ids: Sequence[int], keep_special_tokens: bool = False) -> str:
        return await self._unary(operations.detokenize(ids, keep_special_tokens))

    async def register_adapter(
        self, name: str, path: str, revision: str = "", set_alias: bool = False
    ) -> Adapter:
        """`path`: a converted adapter directory on the agent's machine."""
        return await self._unary(operations.register(name, path, revision, set_alias))

    async def load_adapter(self, name: str, revision: str = "") -> Adapter:
        return await self._unary(operations.load(name, revision))

    async def unload_adapter(
        self,
        name: str,
        revision: str = "",
        mode: UnloadMode = "graceful",
        forget: bool = False,
    ) -> Adapter:
        return await self._unary(operations.unload(name, revision, mode, forget))

    async def set_alias(self, name: str, revision: str, expected_epoch: int | None = None) -> Alias:
        """Raises Conflict when `expected_epoch` is given and the alias has moved on."""
        return await self._unary(operations.set_alias(name, revision, expected_epoch))

    async def pin_adapter(self, name: str, revision: str = "", pinned: bool = True) -> Adapter:
        return await self._unary(operations.pin(name, revision, pinned))

    async def adapters(self) -> Adapters:
        return await self._unary(operations.list_adapters())

    async def capacity(self, rank: int) -> Capacity:
        return await self._unary(operations.capacity(rank))

    async def set_use_case(self, name: str, adapters: Mapping[str, float]) -> UseCase:
        return await self._unary(operations.set_use_case(name, adapters))

    async def delete_use_case(self, name: str) -> bool:
        return await self._unary(operations.delete_use_case(name))

    async def use_cases(self) -> tuple[UseCase, ...]:
        return await self._unary(operations.list_use_cases())

    async def use_case_counts(self) -> tuple[UseCaseCounts, ...]:
        """Requests and tokens by use case, in the order of their first request."""
        return await self._unary(operations.use_case_counts())

    async def status(self) -> EngineStatus:
        return await self._unary(operations.engine_status())

    async def _unary(self, operation: Operation[T]) -> T:
        method = getattr(self._stubs[operation.service], operation.method)

        async def call() -> T:
            return operation.reply(await method(operation.request, timeout=self._timeout_s))

        return await self._attempt(call)

    async def _attempt(self, call: Callable[[], Awaitable[T]]) -> T:
        try:
            if self._retry is None:
                return await call()
            async for attempt in attempts(self._retry):
                with attempt:
                    return await call()
            raise InternalFault("the retry policy allows no attempt")
        except grpc.RpcError as e:
            raise_from(e)
