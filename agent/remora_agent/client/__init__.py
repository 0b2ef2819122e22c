"""Python client of an agent's gRPC inference server. Needs grpc only: loads no model library."""

from remora_agent.client.aio import AsyncClient, AsyncStream
from remora_agent.client.connection import Retry
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
from remora_agent.client.sync import Client, Stream
from remora_agent.runtime.api import FinishReason, TokenLogprob, ToolCall
from remora_agent.serving.tls import ClientTls

__all__ = [
    "Adapter",
    "Adapters",
    "Alias",
    "AsyncClient",
    "AsyncStream",
    "Capacity",
    "Client",
    "ClientTls",
    "Delta",
    "Embeddings",
    "EngineStatus",
    "FinishReason",
    "Result",
    "Retry",
    "Stream",
    "TokenLogprob",
    "Tokens",
    "ToolCall",
    "UseCase",
    "UseCaseCounts",
]
