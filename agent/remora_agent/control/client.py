"""The mutual-TLS channel to the controller and its calls, with errors of Remora's tree.

Owns deadlines and message limits; knows nothing of what the messages mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import grpc

from remora_agent.control.certificates import CONTROLLER_NAME
from remora_agent.control.identity import Identity
from remora_agent.control.sharing.calls import GrpcSharing
from remora_contract.errors import Cancelled
from remora_contract.rpc import from_rpc_error
from remora_protos.control.v1 import control_pb2 as pb
from remora_protos.control.v1 import control_pb2_grpc as pb_grpc
from remora_protos.control.v1 import diagnostics_pb2, diagnostics_pb2_grpc
from remora_protos.control.v1.sharing_pb2_grpc import EngineSharingStub

MAX_MANIFEST_BYTES = 32 << 20
_FETCH_TIMEOUT_S = 600.0
_OPTIONS = (
    ("grpc.ssl_target_name_override", CONTROLLER_NAME),
    ("grpc.max_receive_message_length", MAX_MANIFEST_BYTES + 4096),
    # A NAT forgets an idle connection silently; without pings Watch would never notice.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 30_000),
)


@contextmanager
def enrolment(address: str, ca_pem: bytes) -> Iterator[pb_grpc.EnrolmentStub]:
    """The port that needs no client certificate. Its server is verified; calls raise RemoraErrors.

    `address` is HOST:PORT."""
    credentials = grpc.ssl_channel_credentials(root_certificates=ca_pem)
    options = [("grpc.ssl_target_name_override", CONTROLLER_NAME)]
    with _remora_errors(), grpc.secure_channel(address, credentials, options) as channel:
        yield pb_grpc.EnrolmentStub(channel)


class ControllerClient:
    """Every call raises a RemoraError; Unavailable when the controller cannot be reached."""

    def __init__(self, identity: Identity, address: str | None, timeout_s: float = 30.0) -> None:
        self.address = address or identity.controller
        self._timeout_s = timeout_s
        credentials = grpc.ssl_channel_credentials(
            identity.ca_pem, identity.key_pem, identity.certificate_pem
        )
        self._channel = grpc.secure_channel(self.address, credentials, list(_OPTIONS))
        self._fleet = pb_grpc.FleetStub(self._channel)
        self._artifacts = pb_grpc.ArtifactsStub(self._channel)
        self._diagnostics = diagnostics_pb2_grpc.DiagnosticsStub(self._channel)
        self.sharing = GrpcSharing(EngineSharingStub(self._channel), _remora_errors, timeout_s)

    def sync(self, request: pb.SyncRequest) -> pb.SyncResponse:
        with _remora_errors():
            answer: pb.SyncResponse = self._fleet.Sync(request, timeout=self._timeout_s)
            return answer

    def watch(self) -> grpc.Call:
        """An open stream of Poke: the caller iterates (`grpc.RpcError` ends it) and cancels."""
        with _remora_errors():
            return self._fleet.Watch(pb.WatchRequest())

    def renew(self, csr_pem: bytes) -> pb.RenewResponse:
        request = pb.RenewRequest(csr_pem=csr_pem)
        with _remora_errors():
            answer: pb.RenewResponse = self._fleet.Renew(request, timeout=self._timeout_s)
            return answer

    def deliver(self, answer: diagnostics_pb2.DeliverRequest) -> None:
        with _remora_errors():
            self._diagnostics.Deliver(answer, timeout=_FETCH_TIMEOUT_S)

    def manifest(self, digest: str) -> bytes:
        request = pb.GetManifestRequest(digest=digest)
        with _remora_errors():
            answer = self._artifacts.GetManifest(request, timeout=self._timeout_s)
            return bytes(answer.manifest_json)

    def fetch(self, chunk_digest: str, offset: int, length: int) -> Iterator[bytes]:
        """Bytes [offset, offset+length) of a chunk in pieces. Closing the iterator cancels."""
        request = pb.FetchRequest(chunk_digest=chunk_digest, offset=offset, length=length)
        with _remora_errors():
            # Long, for slow links; when it passes, the caller resumes at the byte it has.
            call = self._artifacts.Fetch(request, timeout=_FETCH_TIMEOUT_S)
            try:
                for message in call:
                    yield message.data
            finally:
                call.cancel()

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> ControllerClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@contextmanager
def _remora_errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as e:
        raise from_rpc_error(e) from e
    except ValueError as e:  # what grpc raises for a call on a closed channel
        raise Cancelled("the connection to the controller was closed") from e
