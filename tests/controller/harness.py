"""A real controller in this process (real gRPC, real mTLS, random ports) and devices that speak
its protocol through real stubs."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import grpc
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from remora_controller import home as homes
from remora_controller import pki
from remora_controller.home import ControllerConfig, Home
from remora_controller.server import Controller, Ports
from remora_protos.control.v1 import control_pb2 as cp
from remora_protos.control.v1 import control_pb2_grpc as cp_grpc
from remora_protos.operator.v1 import operator_pb2 as op
from remora_protos.operator.v1 import operator_pb2_grpc as op_grpc

OPTIONS = (("grpc.ssl_target_name_override", "remora-controller"),)
NOW = datetime(2030, 1, 1, tzinfo=timezone.utc)
WAIT_S = 60.0


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    """Polls a condition of a concurrent system; fails naming it."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.01)


def make_home(root: Path) -> Home:
    return homes.create(root, ["127.0.0.1", "localhost"], datetime.now(timezone.utc))


def make_config(**changes: object) -> ControllerConfig:
    base = ControllerConfig(
        listen="127.0.0.1:0",
        enrolment_listen="127.0.0.1:0",
        metrics_listen="127.0.0.1:0",
        sync_interval_s=0.5,
        offline_after_s=WAIT_S,
    )
    return dataclasses.replace(base, **changes)


class ControllerThread:
    """A controller on an event loop of its own."""

    def __init__(self, home: Home, config: ControllerConfig) -> None:
        self.home = home
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.controller = self._run(self._make(home, config))
        self.ports: Ports = self._run(self.controller.start())

    async def _make(self, home: Home, config: ControllerConfig) -> Controller:
        return Controller(home, config, home.repository)

    def _run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(WAIT_S)

    def stop(self) -> None:
        self._run(self.controller.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()


@contextmanager
def running(home: Home, **changes: object) -> Iterator[ControllerThread]:
    thread = ControllerThread(home, make_config(**changes))
    try:
        yield thread
    finally:
        thread.stop()


def operator_channel(home: Home, port: int) -> grpc.Channel:
    directory = home.operator
    credentials = grpc.ssl_channel_credentials(
        (directory / "ca.pem").read_bytes(),
        (directory / "operator.key").read_bytes(),
        (directory / "operator.pem").read_bytes(),
    )
    return grpc.secure_channel(f"127.0.0.1:{port}", credentials, OPTIONS)


def new_key() -> tuple[bytes, bytes]:
    """(key PEM, certificate request PEM)."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return pem, pki.request_for(key)


def join(home: Home, ports: Ports, token: str, **request: object) -> tuple[cp.JoinResponse, bytes]:
    """The answer and the device's key."""
    key, csr = new_key()
    return join_with(home, ports, token, csr, **request), key


def join_with(
    home: Home, ports: Ports, token: str, csr: bytes, **request: object
) -> cp.JoinResponse:
    credentials = grpc.ssl_channel_credentials(home.ca.read_bytes())
    with grpc.secure_channel(f"127.0.0.1:{ports.enrolment}", credentials, OPTIONS) as channel:
        stub = cp_grpc.EnrolmentStub(channel)
        facts = request.pop("facts", cp.DeviceFacts(hostname="bench"))
        return stub.Join(
            cp.JoinRequest(token=token, csr_pem=csr, facts=facts, **request), timeout=WAIT_S
        )


HAPPY = ("ADMITTED", "STAGING", "BUILDING", "PROVING", "SWITCHING", "SOAKING", "COMMITTED")
UNWELL = ("REVERTING", "REVERTED")
FAILING = ("ADMITTED", "STAGING", "SWITCHING", "SOAKING", "REVERTING", "REVERTED")


@dataclass
class SimulatedDevice:
    """Speaks Sync as an agent does; walks through phases when told to."""

    device_id: str
    channel: grpc.Channel
    facts: cp.DeviceFacts = field(default_factory=lambda: cp.DeviceFacts(hostname="bench"))
    labels: dict[str, str] = field(default_factory=dict)
    boot_id: str = "boot-1"
    seq: int = 0
    generation: int = 0
    desired: cp.DesiredState = field(default_factory=cp.DesiredState)
    phase: str = ""
    running: str = ""
    bundle_digest: str = ""
    bad_releases: set[str] = field(default_factory=set)
    certificate: bytes = b""
    key: bytes = b""

    @property
    def fleet(self) -> cp_grpc.FleetStub:
        return cp_grpc.FleetStub(self.channel)

    def request(self, **extra: object) -> cp.SyncRequest:
        self.seq += 1
        return cp.SyncRequest(
            facts=self.facts,
            labels=self.labels,
            reported=cp.ReportedState(
                phase=self.phase,
                generation=self.generation,
                release_id=self.desired.release_id,
                running_release_id=self.running,
                bundle_digest=self.bundle_digest,
                error_code="Unhealthy" if self.phase in UNWELL else "",
                error_message="the engine failed 3 times" if self.phase in UNWELL else "",
            ),
            seq=self.seq,
            boot_id=self.boot_id,
            known_generation=self.generation,
            **extra,
        )

    def sync(self, **extra: object) -> cp.SyncResponse:
        response = self.fleet.Sync(self.request(**extra), timeout=WAIT_S)
        if response.WhichOneof("answer") == "desired":
            self.desired = response.desired
            self.generation = response.desired.generation
            self.phase = "ASSIGNED" if self.desired.release_id else "UNASSIGNED"
        return response

    def step(self) -> None:
        """One Sync, then one phase further towards what is desired."""
        self.sync()
        if not self.desired.release_id or self.phase in ("COMMITTED", "REVERTED"):
            return
        path = FAILING if self.desired.release_id in self.bad_releases else HAPPY
        at = path.index(self.phase) + 1 if self.phase in path else 0
        self.phase = path[at]
        if self.phase == "COMMITTED":
            self.running = self.desired.release_id

    def settle(self) -> None:
        """Steps until nothing is left to do, and reports it."""
        self.step()
        while self.desired.release_id and self.phase not in ("COMMITTED", "REVERTED"):
            self.step()
        self.sync()


class Fleet:
    """Operator stub and devices of one running controller."""

    def __init__(self, controller: ControllerThread) -> None:
        self.controller = controller
        self.home, self.ports = controller.home, controller.ports
        self._channels = [operator_channel(self.home, self.ports.fleet)]
        self.operator = op_grpc.OperatorStub(self._channels[0])

    def token(self, **labels: str) -> str:
        return self.operator.CreateJoinToken(
            op.CreateJoinTokenRequest(labels=labels), timeout=WAIT_S
        ).token

    def channel(self, certificate: bytes, key: bytes) -> grpc.Channel:
        credentials = grpc.ssl_channel_credentials(self.home.ca.read_bytes(), key, certificate)
        channel = grpc.secure_channel(
            f"127.0.0.1:{self.ports.fleet}",
            credentials,
            [*OPTIONS, ("grpc.use_local_subchannel_pool", 1)],
        )
        self._channels.append(channel)
        return channel

    def device(self, **labels: str) -> SimulatedDevice:
        answer, key = join(self.home, self.ports, self.token(**labels))
        certificate = answer.certificate_pem
        channel = self.channel(certificate, key)
        return SimulatedDevice(answer.device_id, channel, certificate=certificate, key=key)

    def rollout(self, rollout_id: str) -> op.Rollout:
        return self.operator.GetRollout(op.GetRolloutRequest(rollout_id=rollout_id), timeout=WAIT_S)

    def drive(self, rollout_id: str, devices: list[SimulatedDevice], *states: str) -> op.Rollout:
        """Steps all devices until the rollout is in one of the states."""
        rollout = self.rollout(rollout_id)
        deadline = time.monotonic() + WAIT_S
        while rollout.state not in states:
            assert time.monotonic() < deadline, f"{rollout.state}: {rollout.reason}"
            for device in devices:
                device.step()
            rollout = self.rollout(rollout_id)
        return rollout

    def close(self) -> None:
        for channel in self._channels:
            channel.close()


@contextmanager
def fleet(home: Home, **changes: object) -> Iterator[Fleet]:
    with running(home, **changes) as controller:
        made = Fleet(controller)
        try:
            yield made
        finally:
            made.close()
