"""The blocking client. One channel; safe to share between threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from remora_contract.errors import InternalFault

if TYPE_CHECKING:
    from typing_extensions import Unpack

T = TypeVar("T")


class Stream(Iterator[Delta]):
    """Deltas as they are produced. `result` stands once it has ended; `cancel` ends it early."""

    def __init__(self, call: Any, first: Any, choices: int = 1) -> None:
        self._call = call
        self._transcript = Transcript(choices)
        self._transcript.add(first)

    @property
    def request_id(self) -> str:
        return self._transcript.request_id

    @property
    def result(self) -> Result:
        """Raises Refused while the stream runs."""
        return self._transcript.result()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Delta:
        while not self._transcript.finished:
            try:
                delta = self._transcript.add(next(self._call, None))
            except grpc.RpcError as e:
                raise_from(e)
            if delta is not None:
                return delta
        raise StopIteration

    def cancel(self) -> None:
        """Gives up: the agent frees the row and the stream raises Cancelled."""
        self._call.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._call.cancel()  # no effect once it has ended


class Client:
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
            grpc.insecure_channel(to.name(), to.options)
            if to.credentials is None
            else grpc.secure_channel(to.name(), to.credentials, to.options)
        )
        self._stubs = stubs(self._channel)
        self._timeout_s = timeout_s
        self._retry = retry

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """Give `messages` (through the chat template) or `prompt` (text or token ids, no template).
        See `Options` for the rest."""
        return self._unary(operations.generate(one_input(prompt, messages), options))

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        **options: Unpack[Options],
    ) -> Stream:
        """Like `generate`, as the text is produced. Returns once the request is admitted."""
        request = generate_request(one_input(prompt, messages), options)

        def start() -> Stream:
            call = self._stubs["Inference"].Generate(request, timeout=self._timeout_s)
            return Stream(call, next(call, None), request.n)

        return self._attempt(start)

    def embed(
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
        return self._unary(operation)

    def cancel(self, request_id: str) -> bool:
        """False when no such request runs."""
        return self._unary(operations.cancel(request_id))

    def tokenize(self, prompt: Prompt, add_special_tokens: bool | None = None) -> Tokens:
        return self._unary(operations.tokenize(prompt, add_special_tokens))

    def detokenize(self, ids: Sequence[int], keep_special_tokens: bool = False) -> str:
        return self._unary(operations.detokenize(ids, keep_special_tokens))

    def register_adapter(
        self, name: str, path: str, revision: str = "", set_alias: bool = False
    ) -> Adapter:
        """`path`: a converted adapter directory on the agent's machine."""
        return self._unary(operations.register(name, path, revision, set_alias))

    def load_adapter(self, name: str, revision: str = "") -> Adapter:
        return self._unary(operations.load(name, revision))

    def unload_adapter(
        self,
        name: str,
        revision: str = "",
        mode: UnloadMode = "graceful",
        forget: bool = False,
    ) -> Adapter:
        return self._unary(operations.unload(name, revision, mode, forget))

    def set_alias(self, name: str, revision: str, expected_epoch: int | None = None) -> Alias:
        """Raises Conflict when `expected_epoch` is given and the alias has moved on."""
        return self._unary(operations.set_alias(name, revision, expected_epoch))

    def pin_adapter(self, name: str, revision: str = "", pinned: bool = True) -> Adapter:
        return self._unary(operations.pin(name, revision, pinned))

    def adapters(self) -> Adapters:
        return self._unary(operations.list_adapters())

    def capacity(self, rank: int) -> Capacity:
        return self._unary(operations.capacity(rank))

    def set_use_case(self, name: str, adapters: Mapping[str, float]) -> UseCase:
        return self._unary(operations.set_use_case(name, adapters))

    def delete_use_case(self, name: str) -> bool:
        return self._unary(operations.delete_use_case(name))

    def use_cases(self) -> tuple[UseCase, ...]:
        return self._unary(operations.list_use_cases())

    def use_case_counts(self) -> tuple[UseCaseCounts, ...]:
        """Requests and tokens by use case, in the order of their first request."""
        return self._unary(operations.use_case_counts())

    def status(self) -> EngineStatus:
        return self._unary(operations.engine_status())

    def _unary(self, operation: Operation[T]) -> T:
        method = getattr(self._stubs[operation.service], operation.method)
        return self._attempt(
            lambda: operation.reply(method(operation.request, timeout=self._timeout_s))
        )

    def _attempt(self, call: Callable[[], T]) -> T:
        try:
            if self._retry is None:
                return call()
            for attempt in attempts(self._retry):
                with attempt:
                    return call()
            raise InternalFault("the retry policy allows no attempt")
        except grpc.RpcError as e:
            raise_from(e)
