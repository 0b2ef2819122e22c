"""Devices reduced to their protocol: enrolled in the store with key and certificate of their own,
each on a connection of its own, and all they do is Sync when the controller asked them to.

No state directory, no Watch stream, no downloads: what ten thousand devices at rest send.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone

import grpc
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from benchmarks.simulated_fleet.controller import Controller
from remora_controller import pki
from remora_controller.domain import Device, Facts
from remora_controller.store.protocol import JoinTokenRecord
from remora_controller.store.sqlite import SqliteStore
from remora_protos.control.v1 import control_pb2 as pb
from remora_protos.control.v1 import control_pb2_grpc as pb_grpc

_OPTIONS = (("grpc.ssl_target_name_override", "remora-controller"),)
_DEADLINE_S = 120.0


@dataclass(frozen=True)
class Enrolled:
    device_id: str
    key_pem: bytes
    certificate_pem: bytes


@dataclass
class Poller:
    device: Enrolled
    stub: pb_grpc.FleetStub
    seq: int = 0

    async def sync(self) -> tuple[float, float]:
        """Seconds it took, and seconds until the next as the controller asked."""
        self.seq += 1
        request = pb.SyncRequest(
            facts=facts_message(self.device.device_id),
            labels={"site": "s1"},
            reported=pb.ReportedState(),
            seq=self.seq,
            boot_id=f"boot-{self.device.device_id}",
            sent_at_unix_s=time.time(),
        )
        started = time.monotonic()
        answer = await self.stub.Sync(request, timeout=_DEADLINE_S)
        return time.monotonic() - started, answer.next_sync_after_s


@dataclass
class Tally:
    latencies: list[float] = field(default_factory=list)
    failed: int = 0

    def quantile(self, share: float) -> float:
        ordered = sorted(self.latencies)
        return ordered[int(share * (len(ordered) - 1))]

    def clear(self) -> None:
        self.latencies.clear()
        self.failed = 0


def facts_message(device_id: str) -> pb.DeviceFacts:
    return pb.DeviceFacts(
        machine_id=device_id,
        hostname=device_id,
        agent_version="1.0",
        architecture="aarch64",
        device_model="Simulated",
        memory_bytes=8 << 30,
        disk_free_bytes=32 << 30,
        backends={"onnxruntime": "1.22"},
        cores=6,
    )


def enrol_in_store(controller: Controller, count: int) -> list[Enrolled]:
    """Before the controller runs: ten thousand joins would only measure joins."""
    store, authority = SqliteStore(controller.home.database), controller.home.authority()
    now = datetime.now(timezone.utc)
    made = [_enrol_one(store, authority, f"device-{i:05d}", now) for i in range(count)]
    store.close()
    return made


def _enrol_one(
    store: SqliteStore, authority: pki.Authority, device_id: str, now: datetime
) -> Enrolled:
    key = ec.generate_private_key(ec.SECP256R1())
    csr = pki.request_for(key)
    at = now.timestamp()
    store.add_join_token(JoinTokenRecord(device_id, {}, at, at + 3600.0, "benchmark"))
    fingerprint = pki.load_request(csr).key_fingerprint
    facts = Facts(machine_id=device_id, hostname=device_id)
    store.enrol(device_id, Device(device_id, at, fingerprint, facts), at)
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    certificate = authority.issue(csr, pki.Role.DEVICE, device_id, now)
    return Enrolled(device_id, pem, certificate)


class Polling:
    """Every device polls for ever, first spread over `spread_s`, then as it is told."""

    def __init__(self, controller: Controller, devices: Sequence[Enrolled]) -> None:
        self._controller, self._devices = controller, devices
        self.tally = Tally()
        self.asked_s = 0.0

    async def run(self, spread_s: float, settle_s: float, measured_s: float) -> dict[str, float]:
        tasks = [
            asyncio.create_task(self._poll(d, spread_s * i / len(self._devices)))
            for i, d in enumerate(self._devices)
        ]
        await asyncio.sleep(spread_s + settle_s)
        self.tally.clear()
        cpu, started = self._controller.cpu_s(), time.monotonic()
        await asyncio.sleep(measured_s)
        seconds = time.monotonic() - started
        cpu = self._controller.cpu_s() - cpu
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return {"share": cpu / seconds, "per_s": len(self.tally.latencies) / seconds}

    async def _poll(self, device: Enrolled, first_s: float) -> None:
        await asyncio.sleep(first_s)
        credentials = grpc.ssl_channel_credentials(
            self._controller.home.ca.read_bytes(), device.key_pem, device.certificate_pem
        )
        address = f"127.0.0.1:{self._controller.ports['fleet']}"
        async with grpc.aio.secure_channel(address, credentials, _OPTIONS) as channel:
            poller, due = Poller(device, pb_grpc.FleetStub(channel)), time.monotonic()
            while True:
                try:
                    seconds, self.asked_s = await poller.sync()
                    self.tally.latencies.append(seconds)
                except grpc.RpcError:
                    self.tally.failed += 1
                due += self.asked_s or 10.0
                await asyncio.sleep(max(0.0, due - time.monotonic()))
