"""What both clients share about reaching an agent: channel options, stubs, when to try again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import grpc

from remora_agent.serving.address import Address, parse_address
from remora_agent.serving.limits import MAX_MESSAGE_BYTES
from remora_agent.serving.tls import ClientTls, channel_credentials
from remora_contract import rpc as rpc_errors
from remora_contract.errors import DeadlineExceeded, Unsupported
from remora_protos.inference.v1 import inference_pb2_grpc as rpc


@dataclass(frozen=True)
class Retry:
    """Try a call again while the agent is UNAVAILABLE (starting, restarting, unreachable).

    A stream is tried again only before its first event. Needs the package `stamina`.
    """

    attempts: int = 5
    timeout_s: float = 30.0


@dataclass(frozen=True)
class Target:
    address: Address
    credentials: grpc.ChannelCredentials | None
    options: tuple[tuple[str, Any], ...]

    def name(self) -> str:
        return self.address.target()


def target(address: str, tls: ClientTls | None) -> Target:
    """Raises RequestInvalid, Refused (another machine without TLS), DocumentInvalid (PEM)."""
    parsed = parse_address(address)
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.enable_retries", 0),  # nothing is repeated unless the caller asked for it
    ]
    if tls is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return Target(parsed, channel_credentials(parsed, tls), tuple(options))


def stubs(channel: Any) -> dict[str, Any]:
    """By service name; `channel` is grpc's or grpc.aio's."""
    return {
        "Inference": rpc.InferenceStub(channel),
        "Adapters": rpc.AdaptersStub(channel),
        "UseCases": rpc.UseCasesStub(channel),
        "EngineService": rpc.EngineServiceStub(channel),
    }


def raise_from(error: grpc.RpcError) -> NoReturn:
    """Raises the agent's error. A timeout that this side notices first is the same
    DeadlineExceeded that the agent tells."""
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        raise DeadlineExceeded("the timeout passed before the answer was complete") from error
    rpc_errors.raise_from(error)


def unavailable(error: Exception) -> bool:
    """Whether the agent was not there to answer."""
    return isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.UNAVAILABLE


def attempts(retry: Retry) -> Any:
    """stamina's iterator of attempts, sync and async. Raises Unsupported when it is missing."""
    try:
        import stamina
    except ImportError as e:
        raise Unsupported("retry=Retry(…) needs the package stamina: pip install stamina") from e
    return stamina.retry_context(on=unavailable, attempts=retry.attempts, timeout=retry.timeout_s)
