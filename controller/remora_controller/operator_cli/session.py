"""How `remora` reaches its controller: credentials directory, channel, calls with our errors.

DIR/ca.pem  operator.pem  operator.key  controller.toml (address)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import typer

from remora_contract.errors import NotFound, RemoraError, Unavailable
from remora_contract.rpc import from_rpc_error
from remora_controller.home import OperatorConfig, load_toml
from remora_controller.pki import SERVER_NAME
from remora_protos.operator.v1.operator_pb2_grpc import OperatorStub

CALL_TIMEOUT_S = 30.0
COMPLETION_TIMEOUT_S = 2.0
DEFAULT_CREDENTIALS = Path("~/.config/remora")
_OPTIONS = (
    ("grpc.ssl_target_name_override", SERVER_NAME),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_reconnect_backoff_ms", 2000),  # somebody waits
)


@dataclass(frozen=True)
class Settings:
    """The global options; kept in the command's context."""

    credentials: Path | None = None
    controller: str | None = None


class Session:
    """One channel. Every call raises a RemoraError that says what to do next."""

    def __init__(self, directory: Path, address: str, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self.address = address
        self._timeout_s = timeout_s
        credentials = grpc.ssl_channel_credentials(
            _read(directory / "ca.pem"),
            _read(directory / "operator.key"),
            _read(directory / "operator.pem"),
        )
        self._channel = grpc.secure_channel(address, credentials, _OPTIONS)
        self.stub = OperatorStub(self._channel)

    def call(self, method: Callable[..., Any], request: object) -> Any:
        """`session.call(session.stub.ListDevices, request)`; the stub is untyped, so the caller
        names the answer's type."""
        try:
            return method(request, timeout=self._timeout_s)
        except grpc.RpcError as e:
            raise self._explained(from_rpc_error(e)) from e

    def _explained(self, error: RemoraError) -> RemoraError:
        if not isinstance(error, Unavailable):
            return error
        return Unavailable(
            f"no answer from the controller at {self.address}: is remora-controller running "
            "there, and are these its credentials? Where it listens elsewhere, say so with "
            f"--controller HOST:PORT or REMORA_CONTROLLER ({error})"
        )

    def close(self) -> None:
        self._channel.close()


def connect(context: typer.Context) -> Session:
    """Raises NotFound when there are no credentials. Closed with the command."""
    settings = context.find_object(Settings) or Settings()
    directory = credentials_directory(settings)
    address = (
        settings.controller or load_toml(OperatorConfig, directory / "controller.toml").address
    )
    session = Session(directory, address)
    context.call_on_close(session.close)
    return session


def completing(context: typer.Context) -> Session | None:
    """For shell completion, where the root command did not run: from its options as far as they are
    typed. None where nobody could be asked."""
    root = context.find_root().params
    settings = Settings(root.get("credentials"), root.get("controller"))
    try:
        directory = credentials_directory(settings)
        toml = load_toml(OperatorConfig, directory / "controller.toml")
        session = Session(directory, settings.controller or toml.address, COMPLETION_TIMEOUT_S)
    except RemoraError:
        return None  # a completion has nowhere to say what is wrong
    context.call_on_close(session.close)
    return session


def credentials_directory(settings: Settings) -> Path:
    named = settings.credentials or os.environ.get("REMORA_CREDENTIALS")
    directory = Path(named or DEFAULT_CREDENTIALS).expanduser()
    if not (directory / "operator.pem").exists():
        raise NotFound(
            f"no operator credentials in {directory}; name them with --credentials DIR or "
            "REMORA_CREDENTIALS (`remora-controller init` makes them in DIR/operator)"
        )
    return directory


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise NotFound(f"{path} cannot be read: {e.strerror or e}") from e
