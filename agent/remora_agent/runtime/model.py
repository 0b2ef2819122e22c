"""A model that answers, as surfaces and hosts use it, whatever computes it.

`ModelRuntime` (an engine of ours, step by step) and `EdgeModel` (TensorRT Edge-LLM's runtime, whole
requests) are the two there are; their methods say what they raise.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

from remora_agent.bank.directory import AdapterDirectory, Alias
from remora_agent.bank.policy import BankCapacity
from remora_agent.runtime.adapters import AdapterInfo, UnloadMode
from remora_agent.runtime.api import (
    Constraint,
    GenerationRequest,
    OnEvent,
    SamplingOverrides,
    SamplingParams,
    StoppingOverrides,
    StoppingParams,
)
from remora_agent.runtime.constraint import Grammar
from remora_agent.runtime.embedding import EmbeddingRequest, OnEmbedded
from remora_agent.runtime.options import RuntimeOptions
from remora_agent.runtime.spare import SpareSource
from remora_agent.runtime.status import RuntimeStatus
from remora_agent.text.pipeline import TextPipeline
from remora_contract.bundle import Bundle
from remora_contract.release import SamplingDefaults


class ModelAdapters(Protocol):
    """See `remora_agent.runtime.adapters.Adapters`."""

    @property
    def directory(self) -> AdapterDirectory: ...

    def register(
        self, name: str, revision: str | None, directory: Path, *, set_alias: bool = False
    ) -> AdapterInfo: ...

    def load(
        self, name: str, revision: str | None = None, *, timeout_s: float = 60
    ) -> AdapterInfo: ...

    def unload(
        self,
        name: str,
        revision: str | None = None,
        mode: UnloadMode = UnloadMode.GRACEFUL,
        *,
        forget: bool = False,
    ) -> AdapterInfo: ...

    def set_alias(self, name: str, revision: str, expected_epoch: int | None = None) -> Alias: ...

    def pin(
        self, name: str, revision: str | None = None, *, pinned: bool = True
    ) -> AdapterInfo: ...

    def info(self, name: str, revision: str | None = None) -> AdapterInfo: ...

    def list(self) -> tuple[AdapterInfo, ...]: ...

    def capacity(self, rank: int) -> BankCapacity: ...


class Model(Protocol):
    """Hashable by identity. Thread-safe."""

    @property
    def bundle(self) -> Bundle: ...

    @property
    def text(self) -> TextPipeline: ...

    @property
    def options(self) -> RuntimeOptions: ...

    @property
    def adapters(self) -> ModelAdapters: ...

    @property
    def scores(self) -> bool: ...

    def compile(self, constraint: Constraint) -> Future[Grammar]: ...

    def submit_all(
        self,
        requests: Sequence[tuple[GenerationRequest, OnEvent]],
        grammar: Grammar | None = None,
    ) -> None: ...

    def embed(self, request: EmbeddingRequest, on_end: OnEmbedded) -> Callable[[], None]: ...

    def spare_work(self, source: SpareSource) -> None: ...

    def end_spare(self) -> None: ...

    def cancel(self, request_id: str) -> bool: ...

    def withdraw(self, among: Collection[str], moved: Callable[[str], bool]) -> tuple[str, ...]: ...

    def probe(self) -> None: ...

    def sampling(self, asked: SamplingOverrides | None = None) -> SamplingParams: ...

    def stopping(self, asked: StoppingOverrides | None = None) -> StoppingParams: ...

    def set_sampling_defaults(self, sampling: SamplingDefaults) -> None: ...

    def now(self) -> float: ...

    def status(self) -> RuntimeStatus: ...

    def forget_recent(self) -> None: ...

    def metrics(self) -> Mapping[str, float]: ...

    def drain(self, timeout_s: float) -> bool: ...

    def close(self) -> None: ...
