"""Engines that devices share, over the real protocol: who may upload what, and what others get."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import pytest

from remora_contract import errors
from remora_contract.artifact import ArtifactFile, Chunk, Manifest
from remora_contract.bundle import BundleFile
from remora_contract.digests import canonical_json, digest_bytes
from remora_contract.engine import ENGINE_JSON, EngineDocument, EngineKey, manifest_facts
from remora_contract.rpc import from_rpc_error
from remora_controller.sharing import depot
from remora_protos.control.v1 import control_pb2 as cp
from remora_protos.control.v1 import control_pb2_grpc as cp_grpc
from remora_protos.control.v1 import sharing_pb2 as sp
from remora_protos.control.v1.sharing_pb2_grpc import EngineSharingStub
from remora_protos.operator.v1 import operator_pb2 as op
from tests.controller.harness import WAIT_S, Fleet, SimulatedDevice, fleet

CHUNK = 1000


@dataclass(frozen=True)
class Engine:
    """What a device would upload: its key, its manifest, its chunks by digest."""

    key: EngineKey
    manifest: Manifest
    chunks: dict[str, bytes]

    @property
    def key_json(self) -> bytes:
        return canonical_json(self.key)


def made(seed: str = "x", plan_bytes: int = 4500, **recipe: str) -> Engine:
    graph = BundleFile("model.onnx", 10, digest_bytes(b"graph"))
    key = EngineKey((graph,), {"backend": "onnxruntime", **recipe})
    plan = (hashlib.sha256(seed.encode()).hexdigest() * (plan_bytes // 64 + 1))[
        :plan_bytes
    ].encode()
    listed = BundleFile("engine.plan", len(plan), digest_bytes(plan))
    document = EngineDocument(key, (listed,), {})
    files = {ENGINE_JSON: canonical_json(document), "engine.plan": plan}
    chunks: dict[str, bytes] = {}
    shipped = []
    for path, data in files.items():
        parts = [data[i : i + CHUNK] for i in range(0, len(data), CHUNK)]
        chunks |= {digest_bytes(p): p for p in parts}
        named = tuple(Chunk(digest_bytes(p), len(p)) for p in parts)
        shipped.append(ArtifactFile(path, len(data), digest_bytes(data), named))
    manifest = Manifest(
        1,
        "engine",
        document.digest,
        "shared",
        "1",
        document.base_digest,
        tuple(shipped),
        "2030-01-01T00:00:00Z",
        facts=manifest_facts(document),
    )
    return Engine(key, manifest, chunks)


class Device:
    """Its calls; errors are Remora's."""

    def __init__(self, device: SimulatedDevice) -> None:
        self.id = device.device_id
        self._device = device
        self._stub = EngineSharingStub(device.channel)
        device.sync()

    def _call(self, name: str, request):
        try:
            return getattr(self._stub, name)(request, timeout=WAIT_S)
        except grpc.RpcError as e:
            raise from_rpc_error(e) from e

    def claim(self, engine: Engine) -> sp.ClaimEngineResponse:
        return self._call("ClaimEngine", sp.ClaimEngineRequest(key_json=engine.key_json))

    def answer(self, engine: Engine) -> str:
        return self.claim(engine).WhichOneof("answer")

    def offer(self, engine: Engine, manifest: Manifest | None = None) -> list[str]:
        request = sp.OfferEngineRequest(
            key_digest=engine.key.digest, manifest_json=canonical_json(manifest or engine.manifest)
        )
        return list(self._call("OfferEngine", request).missing_chunks)

    def put(self, engine: Engine, digest: str, data: bytes | None = None) -> None:
        data = engine.chunks[digest] if data is None else data
        request = sp.PutEngineChunkRequest(
            key_digest=engine.key.digest, chunk_digest=digest, data=data
        )
        self._call("PutEngineChunk", request)

    def finish(self, engine: Engine) -> str:
        request = sp.FinishEngineRequest(key_digest=engine.key.digest)
        return self._call("FinishEngine", request).engine_digest

    def upload(self, engine: Engine) -> str:
        for digest in self.offer(engine):
            self.put(engine, digest)
        return self.finish(engine)

    def reject(self, engine: Engine, why: str = "wrong answers") -> None:
        request = sp.RejectEngineRequest(
            key_digest=engine.key.digest, engine_digest=engine.manifest.digest, why=why
        )
        self._call("RejectEngine", request)

    def fetch(self, engine: Engine) -> dict[str, bytes]:
        """Every chunk that the served manifest names."""
        stub = cp_grpc.ArtifactsStub(self._device.channel)
        digest = engine.manifest.digest
        try:
            answer = stub.GetManifest(cp.GetManifestRequest(digest=digest), timeout=WAIT_S)
            assert answer.manifest_json == canonical_json(engine.manifest)
            return {
                c: b"".join(
                    m.data
                    for m in stub.Fetch(
                        cp.FetchRequest(chunk_digest=c, length=size), timeout=WAIT_S
                    )
                )
                for c, size in engine.manifest.chunks().items()
            }
        except grpc.RpcError as e:
            raise from_rpc_error(e) from e


@pytest.fixture
def world(home) -> Iterator[Fleet]:
    with fleet(home, engine_sharing="all") as running:
        yield running


@pytest.fixture
def pair(world) -> tuple[Device, Device]:
    return Device(world.device()), Device(world.device())


def test_what_the_first_builds_the_others_get_byte_for_byte(world, pair):
    first, second = pair
    engine = made()
    assert first.answer(engine) == "build"
    waits = second.claim(engine).wait
    assert waits.why.startswith(f"waiting for {first.id} to build")
    assert first.upload(engine) == engine.manifest.digest
    told = second.claim(engine).fetch
    assert (told.digest, told.built_by) == (engine.manifest.digest, first.id)
    assert second.fetch(engine) == engine.chunks
    (shown,) = world.operator.ListSharedEngines(op.ListSharedEnginesRequest()).engines
    assert (shown.state, shown.built_by, shown.taken) == ("READY", first.id, 1)


def test_only_the_leases_holder_may_upload(pair):
    first, second = pair
    engine = made()
    with pytest.raises(errors.NotFound, match="has not asked"):
        first.offer(engine)
    first.claim(engine)
    second.claim(engine)
    with pytest.raises(errors.Refused, match="does not hold the lease"):
        second.offer(engine)
    first.offer(engine)
    with pytest.raises(errors.Refused, match="does not hold the lease"):
        second.put(engine, next(iter(engine.chunks)))
    with pytest.raises(errors.Refused, match="does not hold the lease"):
        second.finish(engine)


def test_bytes_other_than_promised_are_not_taken(pair):
    first, _ = pair
    engine = made()
    first.claim(engine)
    missing = first.offer(engine)
    data = engine.chunks[missing[0]]
    with pytest.raises(errors.ArtifactInvalid, match="other bytes than promised"):
        first.put(engine, missing[0], data[:-1] + b"!")
    with pytest.raises(errors.NotFound, match="has no chunk"):
        first.put(engine, digest_bytes(b"another"), b"another")
    with pytest.raises(errors.ArtifactInvalid, match="are missing"):
        first.finish(engine)
    assert first.offer(engine) == missing
    assert first.upload(engine) == engine.manifest.digest


def test_an_upload_goes_on_after_the_controller_starts_again(home):
    engine = made()
    with fleet(home, engine_sharing="all") as world:
        device = world.device()
        first = Device(device)
        first.claim(engine)
        missing = first.offer(engine)
        for digest in missing[:2]:
            first.put(engine, digest)
    (home.shared_engines / "cas" / "sha256" / "aa").mkdir(parents=True, exist_ok=True)
    torn = home.shared_engines / "cas" / "sha256" / "aa" / ".torn"
    torn.write_bytes(b"half a chunk")
    with fleet(home, engine_sharing="all") as world:
        again = SimulatedDevice(device.device_id, world.channel(*credentials_of(device)))
        first = Device(again)
        assert first.offer(engine) == missing[2:]
        assert first.upload(engine) == engine.manifest.digest
        assert first.finish(engine) == engine.manifest.digest, "the answer may have been lost"
        assert not torn.exists()


def credentials_of(device: SimulatedDevice) -> tuple[bytes, bytes]:
    return device.certificate, device.key


def test_a_rejected_engine_reaches_nobody_any_more_and_another_may_build(world, pair):
    first, second = pair
    engine = made()
    first.claim(engine)
    first.upload(engine)
    second.claim(engine)
    second.reject(engine)
    with pytest.raises(errors.NotFound):
        second.fetch(engine)
    assert second.answer(engine) == "build"
    with pytest.raises(errors.Refused, match="rejected just these bytes"):
        second.offer(engine)
    better = made("better")
    assert second.upload(better) == better.manifest.digest
    assert first.claim(engine).fetch.digest == better.manifest.digest
    events = [e.name for e in world.operator.ListEvents(op.ListEventsRequest(limit=50)).events]
    assert "engine.rejected" in events


def test_a_site_shares_within_itself_and_only_operators_say_what_a_site_is(home):
    with fleet(home, engine_sharing="site") as world:
        berlin, berlin2, paris = (
            Device(world.device(site=site)) for site in ("berlin", "berlin", "paris")
        )
        own = world.device()
        own.labels = {"site": "berlin"}
        engine = made()
        assert berlin.answer(engine) == "build"
        assert berlin2.answer(engine) == "wait"
        assert paris.answer(engine) == "build"
        assert "no label site from an operator" in Device(own).claim(engine).alone.why


def test_sharing_is_off_unless_it_is_asked_for(home):
    with fleet(home) as world:
        device = Device(world.device())
        assert device.claim(made()).alone.why == "engine sharing is off"
        with pytest.raises(errors.Forbidden, match="sharing is off"):
            device.offer(made())


def test_engines_beyond_the_bytes_make_room_and_one_that_never_fits_evicts_nobody(home):
    with fleet(home, engine_sharing="all", shared_engines_bytes=1 << 20) as world:
        device = Device(world.device())
        old = made("old", 700_000, name="old")
        device.claim(old)
        device.upload(old)
        huge = made("huge", (1 << 20) + 1, name="huge")
        device.claim(huge)
        with pytest.raises(errors.Exhausted, match="shared_engines_bytes"):
            device.offer(huge)
        assert device.answer(old) == "fetch", "what never fits makes nobody leave"
        new = made("new", 700_000, name="new")
        device.claim(new)
        device.upload(new)
        assert device.answer(new) == "fetch"
        assert device.answer(old) == "build", "the one that was used longest ago made room"


def test_a_full_disk_is_a_refusal_and_leaves_what_was_there(world, pair, monkeypatch):
    first, _ = pair
    engine = made()
    first.claim(engine)
    monkeypatch.setattr(depot, "DISK_FLOOR_BYTES", 1 << 60)
    with pytest.raises(errors.Exhausted, match="must stay"):
        first.offer(engine)
    monkeypatch.undo()
    assert first.upload(engine) == engine.manifest.digest


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "bundle"},
        {"files": ()},
        {"signatures": ({"key_id": "k", "value": "v"},)},
        {"digest": digest_bytes(b"another")},
        {"base_digest": digest_bytes(b"another")},
    ],
)
def test_a_manifest_that_is_no_engines_is_refused(pair, change):
    first, second = pair
    engine = made()
    first.claim(engine)
    lying = dataclasses.replace(engine.manifest, **change)
    with pytest.raises((errors.ArtifactInvalid, errors.DocumentInvalid)):
        first.offer(engine, lying)
        for digest in engine.chunks:
            first.put(engine, digest)
        first.finish(engine)
    assert second.answer(engine) == "wait"


def test_an_engine_of_another_key_is_not_what_the_lease_is_for(pair):
    first, _ = pair
    leased, other = made(), made(threads="2")
    first.claim(leased)
    for digest in first.offer(leased, other.manifest):
        first.put(dataclasses.replace(leased, chunks=other.chunks), digest)
    with pytest.raises(errors.ArtifactInvalid, match="another build key"):
        first.finish(leased)


def test_paths_outside_and_absurd_keys_are_refused(pair):
    first, _ = pair
    engine = made()
    first.claim(engine)
    text = canonical_json(engine.manifest).replace(b'"engine.plan"', b'"../../engine.plan"')
    request = sp.OfferEngineRequest(key_digest=engine.key.digest, manifest_json=text)
    with pytest.raises((errors.ArtifactInvalid, errors.DocumentInvalid)):
        first._call("OfferEngine", request)
    for key_json in (b"", b"{}", b"[" * 10_000, b'{"files": [], "recipe": {}}'):
        with pytest.raises((errors.DocumentInvalid, errors.RequestInvalid)):
            first._call("ClaimEngine", sp.ClaimEngineRequest(key_json=key_json))


def test_an_operator_removes_an_engine_and_its_bytes(world, pair):
    first, second = pair
    engine = made()
    first.claim(engine)
    first.upload(engine)
    request = op.RemoveSharedEngineRequest(key_digest=engine.key.digest)
    world.operator.RemoveSharedEngine(request, timeout=WAIT_S)
    with pytest.raises(errors.NotFound):
        second.fetch(engine)
    assert list((world.home.shared_engines / "cas").rglob("*.plan")) == []
    assert [p for p in (world.home.shared_engines / "cas").rglob("*") if p.is_file()] == []
    with pytest.raises(grpc.RpcError, match="no shared engine"):
        world.operator.RemoveSharedEngine(request, timeout=WAIT_S)


def test_an_upload_is_in_the_audit_log_with_who_from_where_and_what(world, pair):
    first, _ = pair
    engine = made()
    first.claim(engine)
    first.upload(engine)
    first.finish(engine)  # its answer was lost: told again, and not written down again
    log = world.operator.ListAudit(op.ListAuditRequest(), timeout=WAIT_S)
    asked, done = (e for e in log.entries if e.what == "FinishEngine")
    assert (asked.who, asked.role) == (first.id, "device")
    assert "127.0.0.1" in asked.where
    assert engine.manifest.digest in asked.detail_json
    assert (done.answers, done.result) == (asked.seq, "OK")
    assert log.broken == ""


def test_an_upload_that_comes_too_late_is_written_down_with_why_it_was_not_taken(home):
    with fleet(home, engine_sharing="all", engine_lease_s=1.0) as world:
        desk = world.controller.controller._desk
        first = Device(world.device())
        engine = made()
        first.claim(engine)
        first.offer(engine)
        for digest in engine.chunks:
            first.put(engine, digest)
        taken = desk._finished

        def too_late(device, key_digest, whole):
            second = world.controller.controller._store.device(first.id)
            desk.give_up(second, key_digest, False, "taken over")
            taken(device, key_digest, whole)

        desk._finished = too_late
        with pytest.raises(errors.RemoraError):
            first.finish(engine)
        log = world.operator.ListAudit(op.ListAuditRequest(), timeout=WAIT_S)
        asked, done = (e for e in log.entries if e.what == "FinishEngine")
        assert done.answers == asked.seq
        assert done.result not in ("", "OK") and done.message
