"""A controller small enough to read: a CA, both ports, and knobs for what should go wrong.

Speaks docs/control.md with real TLS. It stores what devices report and answers with whatever the
test puts in `desired`.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from remora_contract import errors
from remora_contract.artifact import chunk_key, manifest_key
from remora_contract.digests import canonical_json, hex_of
from remora_contract.join_token import JoinToken
from remora_contract.release import Release
from remora_contract.rpc import to_status
from remora_protos.control.v1 import control_pb2 as pb
from remora_protos.control.v1 import control_pb2_grpc as pb_grpc

PIECE_BYTES = 16 * 1024


class TestCa:
    """Issues what a controller issues."""

    __test__ = False

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "remora test ca")])
        self.certificate = self._sign(name, self.key.public_key(), timedelta(days=3650), ca=True)

    @property
    def pem(self) -> bytes:
        return _pem(self.certificate)

    @property
    def sha256(self) -> str:
        der = self.certificate.public_bytes(serialization.Encoding.DER)
        return hashlib.sha256(der).hexdigest()

    def server(self, dns_name: str = "remora-controller") -> tuple[bytes, bytes]:
        """Key and chain (leaf, CA), PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = self._sign(
            _subject("controller", "c"), key.public_key(), timedelta(days=30), dns_name
        )
        return _key_pem(key), _pem(leaf) + self.pem

    def device(
        self, device_id: str, csr_pem: bytes, life: timedelta, age: timedelta = timedelta()
    ) -> bytes:
        csr = x509.load_pem_x509_csr(csr_pem)
        return _pem(self._sign(_subject("device", device_id), csr.public_key(), life, age=age))

    def _sign(
        self,
        subject: x509.Name,
        key: object,
        life: timedelta,
        dns_name: str | None = None,
        ca: bool = False,
        age: timedelta = timedelta(),
    ) -> x509.Certificate:
        start = datetime.now(timezone.utc) - timedelta(minutes=5) - age
        issuer = subject if ca else self.certificate.subject
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + life)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if dns_name is not None:
            names = x509.SubjectAlternativeName([x509.DNSName(dns_name)])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self.key, hashes.SHA256())


@dataclass
class Faults:
    """What goes wrong, by chunk digest or for all; each counts down to nothing."""

    corrupt: Counter[str] = field(default_factory=Counter)  # chunk digest -> answers to spoil
    too_long: Counter[str] = field(default_factory=Counter)
    cut_after: dict[str, int] = field(
        default_factory=dict
    )  # chunk digest -> bytes, then Unavailable
    sync_error: errors.RemoraError | None = None
    wait_before_piece: Callable[[str, int], None] | None = None  # (chunk, offset)


class FakeController:
    """Start with `start()`, end with `stop()`; `restart()` keeps ports and state."""

    def __init__(self, repository: Path, life: timedelta = timedelta(days=30)) -> None:
        self.ca, self.repository, self.life = TestCa(), repository, life
        self.secret = "s" * 43
        self.faults = Faults()
        self.syncs: list[pb.SyncRequest] = []
        self.joins: list[pb.JoinRequest] = []
        self.renewals: list[pb.RenewRequest] = []
        self.expired_renewals: list[pb.RenewExpiredRequest] = []
        self.fetches: list[pb.FetchRequest] = []
        self.sent_bytes = 0
        self.events: dict[int, pb.DeviceEvent] = {}
        self.metrics: list[pb.Metric] = []
        self.desired = pb.DesiredState()
        self.next_sync_after_s = 0.2
        self.quarantined = False
        self._boots: list[str] = []
        self._last_seq = 0
        self.changed = threading.Condition()
        self._ports = [0, 0]
        self._servers: list[grpc.Server] = []
        self._stopping = threading.Event()

    @property
    def token(self) -> JoinToken:
        return JoinToken(self.secret, self.ca.sha256)

    @property
    def fleet_address(self) -> str:
        return f"127.0.0.1:{self._ports[0]}"

    @property
    def enrolment_address(self) -> str:
        return f"127.0.0.1:{self._ports[1]}"

    def start(self, dns_name: str = "remora-controller") -> FakeController:
        self._stopping.clear()
        key, chain = self.ca.server(dns_name)
        fleet = grpc.ssl_server_credentials([(key, chain)], self.ca.pem, require_client_auth=True)
        enrolment = grpc.ssl_server_credentials([(key, chain)])
        self._servers = [
            self._serve(0, fleet, _Fleet(self), _Artifacts(self)),
            self._serve(1, enrolment, _Enrolment(self)),
        ]
        return self

    def stop(self) -> None:
        self._stopping.set()
        with self.changed:
            self.changed.notify_all()
        for server in self._servers:
            server.stop(grace=0).wait()

    def restart(self) -> None:
        self.stop()
        self.start()

    def assign(self, release: Release, soak_s: float = 0.0, **fields: object) -> int:
        """A new generation; returns it."""
        with self.changed:
            generation = self.desired.generation + 1
            self.desired = pb.DesiredState(
                generation=generation,
                release_id=release.release_id,
                release_json=canonical_json(release),
                soak_s=soak_s,
                rollout_id="r1",
                **fields,
            )
            self.changed.notify_all()
        return generation

    def wait(
        self, condition: Callable[[pb.SyncRequest], bool], timeout_s: float = 60.0
    ) -> pb.SyncRequest:
        """The first report that satisfies the condition, from now on or already received."""
        seen = 0
        with self.changed:

            def found() -> bool:
                nonlocal seen
                while seen < len(self.syncs):
                    if condition(self.syncs[seen]):
                        return True
                    seen += 1
                return False

            assert self.changed.wait_for(found, timeout_s), self._history()
            return self.syncs[seen]

    def wait_phase(
        self, phase: str, generation: int | None = None, timeout_s: float = 60.0
    ) -> pb.ReportedState:
        wanted = generation or self.desired.generation
        sync = self.wait(
            lambda s: s.reported.phase == phase and s.reported.generation == wanted, timeout_s
        )
        return sync.reported

    def _history(self) -> str:
        seen = [
            f"{s.reported.generation}:{s.reported.phase} {s.reported.error_message}"
            for s in self.syncs
        ]
        return "\n".join(dict.fromkeys(seen))

    def _serve(
        self, index: int, credentials: grpc.ServerCredentials, *services: object
    ) -> grpc.Server:
        server = grpc.server(futures.ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
        for service in services:
            service.register(server)
        port = server.add_secure_port(f"127.0.0.1:{self._ports[index]}", credentials)
        self._ports[index] = port
        server.start()
        return server

    def follow(self, boot_id: str, seq: int) -> None:
        """One identity on two machines, as docs/control.md describes it."""
        if boot_id in self._boots[:-1] or (
            self._boots and boot_id == self._boots[-1] and seq < self._last_seq
        ):
            self.quarantined = True
            self.changed.notify_all()
        if boot_id not in self._boots:
            self._boots.append(boot_id)
        self._last_seq = seq
        if self.quarantined:
            raise errors.Refused("quarantined: one identity on two machines")


class _Enrolment(pb_grpc.EnrolmentServicer):
    def __init__(self, controller: FakeController) -> None:
        self._c = controller

    def register(self, server: grpc.Server) -> None:
        pb_grpc.add_EnrolmentServicer_to_server(self, server)

    def Join(self, request: pb.JoinRequest, context: grpc.ServicerContext) -> pb.JoinResponse:
        c = self._c
        c.joins.append(request)
        if JoinToken.decode(request.token).secret != c.secret:
            _abort(context, errors.Unauthenticated("this token was used or has expired"))
        device_id = f"dev-{len(c.joins)}"
        certificate = c.ca.device(device_id, request.csr_pem, c.life)
        return pb.JoinResponse(
            device_id=device_id,
            certificate_pem=certificate,
            ca_pem=c.ca.pem,
            fleet_port=c._ports[0],
        )

    def RenewExpired(
        self, request: pb.RenewExpiredRequest, context: grpc.ServicerContext
    ) -> pb.RenewResponse:
        c = self._c
        c.expired_renewals.append(request)
        return pb.RenewResponse(
            certificate_pem=c.ca.device("dev-1", request.csr_pem, c.life), ca_pem=c.ca.pem
        )


class _Fleet(pb_grpc.FleetServicer):
    def __init__(self, controller: FakeController) -> None:
        self._c = controller

    def register(self, server: grpc.Server) -> None:
        pb_grpc.add_FleetServicer_to_server(self, server)

    def Sync(self, request: pb.SyncRequest, context: grpc.ServicerContext) -> pb.SyncResponse:
        c = self._c
        with c.changed:
            try:
                if c.faults.sync_error is not None:
                    raise c.faults.sync_error
                c.follow(request.boot_id, request.seq)
            except errors.RemoraError as e:
                _abort(context, e)
            c.syncs.append(request)
            c.events.update({e.seq: e for e in request.events})
            c.metrics.extend(request.metrics)
            c.changed.notify_all()
            answer = pb.SyncResponse(
                next_sync_after_s=c.next_sync_after_s,
                events_stored_up_to=max(c.events, default=0),
            )
            if request.known_generation == c.desired.generation:
                answer.not_modified.SetInParent()
            else:
                answer.desired.CopyFrom(c.desired)
            return answer

    def Watch(self, request: pb.WatchRequest, context: grpc.ServicerContext) -> Iterator[pb.Poke]:
        c, told = self._c, self._c.desired.generation
        while context.is_active() and not c._stopping.is_set():
            with c.changed:
                if c.desired.generation == told and not c._stopping.is_set():
                    c.changed.wait(timeout=0.5)
                generation = c.desired.generation
            if generation != told:
                told = generation
                yield pb.Poke(generation=generation)

    def Renew(self, request: pb.RenewRequest, context: grpc.ServicerContext) -> pb.RenewResponse:
        c = self._c
        with c.changed:
            c.renewals.append(request)
            c.changed.notify_all()
        certificate = c.ca.device("dev-1", request.csr_pem, timedelta(days=30))
        return pb.RenewResponse(certificate_pem=certificate, ca_pem=c.ca.pem)


class _Artifacts(pb_grpc.ArtifactsServicer):
    def __init__(self, controller: FakeController) -> None:
        self._c = controller

    def register(self, server: grpc.Server) -> None:
        pb_grpc.add_ArtifactsServicer_to_server(self, server)

    def GetManifest(
        self, request: pb.GetManifestRequest, context: grpc.ServicerContext
    ) -> pb.GetManifestResponse:
        path = self._c.repository / manifest_key(request.digest)
        if not path.exists():
            _abort(context, errors.NotFound(f"artifact {hex_of(request.digest)[:12]} is unknown"))
        return pb.GetManifestResponse(manifest_json=path.read_bytes())

    def Fetch(
        self, request: pb.FetchRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.FetchResponse]:
        c, digest = self._c, request.chunk_digest
        c.fetches.append(request)
        data = (c.repository / chunk_key(digest)).read_bytes()
        end = request.offset + request.length if request.length else len(data)
        data = data[: min(end, len(data))]
        if c.faults.corrupt[digest] > 0:
            c.faults.corrupt[digest] -= 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        if c.faults.too_long[digest] > 0:
            c.faults.too_long[digest] -= 1
            data += b"more"
        cut = c.faults.cut_after.pop(digest, None)
        for at in range(request.offset, len(data), PIECE_BYTES):
            if cut is not None and at >= cut:
                _abort(context, errors.Unavailable("restarting"))
            if c.faults.wait_before_piece is not None:
                c.faults.wait_before_piece(digest, at)
            piece = data[at : at + PIECE_BYTES]
            c.sent_bytes += len(piece)
            yield pb.FetchResponse(data=piece)


def _abort(context: grpc.ServicerContext, error: errors.RemoraError) -> None:
    context.abort_with_status(to_status(error))


def _subject(unit: str, name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "remora"),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
