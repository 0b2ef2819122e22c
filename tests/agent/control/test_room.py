"""What the agent tells of its disk, and what it drops or refuses where room or memory is short."""

from __future__ import annotations

import dataclasses

import pytest

from remora_agent.control import staging
from remora_agent.control.facts import machine_facts
from remora_agent.control.held import HeldArtifacts
from remora_contract.device_phase import Phase
from remora_contract.engine import EngineKey
from remora_contract.errors import EngineFault, Exhausted
from remora_contract.held import Held
from remora_contract.memory_need import FACT, Sizing, memory_need_refusals
from remora_protos.control.v1 import control_pb2 as pb
from tests.agent.control.device import Device
from tests.agent.control.test_reconcile import commit, failing
from tests.support.repository import Repository, make_release


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path / "repository")


@pytest.fixture
def device(tmp_path, repository):
    made = Device(tmp_path / "state", repository.root)
    yield made
    made.database.close()


def teller(device: Device) -> HeldArtifacts:
    return HeldArtifacts(device.layout, device.host, lambda: device.record, ())


def told(held: HeldArtifacts) -> pb.SyncRequest:
    request = pb.SyncRequest()
    held.put_into(request)
    return request


def names(digests: list[bytes]) -> set[str]:
    return {f"sha256:{d.hex()}" for d in digests}


def test_committed_and_previous_stay_and_the_failed_one_is_loose(device, repository):
    bundles = [repository.bundle(n, 120_000) for n in (1, 2, 3)]
    commit(device, make_release("one", bundles[0]))
    commit(device, make_release("two", bundles[1]))
    device.host.hooks["prove"] = failing(EngineFault("wrong"))
    device.assign(make_release("three", bundles[2]))
    assert device.settle().phase is Phase.FAILED
    device.host.missing = None
    found = told(teller(device)).held
    assert names(found.kept) == {bundles[0].digest, bundles[1].digest}
    assert names(found.loose) == {bundles[2].digest}
    assert names(found.built) == {b.digest for b in bundles}, "the host says that none is missing"


def test_it_is_told_once_and_again_when_it_changed_or_is_asked_for(device, repository):
    commit(device, make_release("one", repository.bundle(1, 120_000)))
    held = teller(device)
    first = told(held)
    assert first.HasField("held") and first.held_fingerprint
    assert told(held).HasField("held"), "no answer came: it may be lost"
    held.answered(first, pb.SyncResponse())
    second = told(held)
    assert not second.HasField("held") and second.held_fingerprint == first.held_fingerprint
    held.answered(second, pb.SyncResponse(wants_held=True))
    assert told(held).HasField("held"), "the controller lost it"
    held.answered(told(held), pb.SyncResponse())
    commit(device, make_release("two", repository.bundle(2, 120_000)))
    assert told(held).HasField("held")
    assert told(held).held_fingerprint != first.held_fingerprint


def test_an_empty_disk_says_nothing(device):
    request = told(teller(device))
    assert (request.held_fingerprint, request.HasField("held")) == (Held().fingerprint, False)


def test_what_does_not_belong_there_or_cannot_be_read_keeps_no_device_from_syncing(
    device, repository
):
    commit(device, make_release("one", repository.bundle(1, 120_000)))
    held = teller(device)
    before = told(held).held_fingerprint
    (device.layout.artifacts / "lost+found").mkdir()
    (device.layout.artifacts / "notes.txt").write_text("mine")
    assert told(held).held_fingerprint == before
    gone = device.layout.engines
    gone.rename(gone.with_name("moved"))
    assert told(held).held_fingerprint == before
    gone.with_name("moved").rename(gone)


def test_an_engine_that_is_not_built_is_not_told(device, repository):
    commit(device, make_release("one", repository.bundle(1, 120_000)))
    device.host.missing = EngineKey((), {})
    assert list(told(teller(device)).held.built) == []


def loose_bundle(device: Device, repository: Repository, seed: int = 2):
    """On the disk, of a release that failed."""
    bundle = repository.bundle(seed, 120_000)
    device.host.hooks["prove"] = failing(EngineFault("wrong"))
    device.assign(make_release(f"bad-{seed}", bundle))
    assert device.settle().phase is Phase.FAILED
    device.host.hooks.clear()
    assert device.layout.artifact(bundle.digest).is_dir()
    return bundle


def short_until(device: Device, monkeypatch, *gone) -> None:
    """The disk has room only once these are gone."""

    def free(path):
        there = [b for b in gone if device.layout.artifact(b.digest).exists()]
        return 10 if there else 1 << 40

    monkeypatch.setattr(staging, "disk_free", free)


def test_a_disk_that_is_short_loses_what_nothing_needs_and_only_then(
    device, repository, monkeypatch
):
    served = repository.bundle(1, 120_000)
    commit(device, make_release("one", served))
    left = loose_bundle(device, repository)
    with monkeypatch.context() as patched:
        patched.setattr(staging, "disk_free", lambda path: 1 << 40)
        device.assign(make_release("roomy", repository.bundle(3, 120_000)))
        device.settle(Phase.BUILDING)
        assert device.layout.artifact(left.digest).is_dir(), "its chunks may be of use"
    short_until(device, monkeypatch, left)
    commit(device, make_release("short", repository.bundle(4, 120_000)))
    assert not device.layout.artifact(left.digest).exists()
    assert device.layout.artifact(served.digest).is_dir()


def test_what_the_new_release_names_is_not_dropped_to_make_room_for_it(
    device, repository, monkeypatch
):
    commit(device, make_release("one", repository.bundle(1, 120_000)))
    again = loose_bundle(device, repository, 2)
    adapter = repository.adapter(11)
    sent = device.source.sent
    monkeypatch.setattr(staging, "disk_free", lambda path: 10)
    device.assign(make_release("again", again, adapter))
    assert device.settle().phase is Phase.FAILED
    assert "disk" in device.record.error_message
    assert device.layout.artifact(again.digest).is_dir()
    assert device.source.sent == sent


def test_a_build_that_finds_no_room_is_tried_again_once_room_is_made(device, repository):
    commit(device, make_release("one", repository.bundle(1, 120_000)))
    left = loose_bundle(device, repository)

    def no_room(assignment, progress):
        if device.layout.artifact(left.digest).exists():
            raise Exhausted("building the engine may take more than is free")

    device.host.hooks["build"] = no_room
    commit(device, make_release("three", repository.bundle(3, 120_000)))


def test_a_build_that_finds_no_room_where_nothing_can_go_fails_at_once(device, repository):
    commit(device, make_release("one", repository.bundle(1, 120_000)))
    device.host.hooks["build"] = failing(Exhausted("building the engine may take more"))
    device.assign(make_release("two", repository.bundle(2, 120_000)))
    assert device.settle().phase is Phase.FAILED
    assert [c[0] for c in device.host.calls].count("build") == 2


SIZING = Sizing("onnxruntime", 4, None, 1 << 20, "plain")


def heavy(repository: Repository, seed: int, weights: int):
    """A bundle whose manifest says what its engine takes."""
    manifest = repository.bundle(seed, 120_000)
    sizes = {"weights": weights, "int8_prefill": 0, "kv_token": 1, "bank": 0, "row_slot": 0}
    facts = {FACT: sizes, "context": 64}
    repository.tamper(manifest, facts=facts)
    return dataclasses.replace(manifest, facts=facts)


def size(device: Device) -> None:
    device.reconciler._effects = dataclasses.replace(device.effects, sizing=SIZING)


def test_an_engine_that_no_memory_here_could_hold_is_refused_before_a_byte_is_shipped(
    device, repository
):
    size(device)
    memory = machine_facts(device.layout.root).memory_bytes
    too_big = heavy(repository, 1, memory)
    device.assign(make_release("big", too_big))
    assert device.settle().phase is Phase.REFUSED
    (refusal,) = memory_need_refusals(too_big.facts, SIZING, memory)
    assert device.record.error_code == "memory"
    assert str(refusal) in device.record.error_message, "as the plan says it"
    assert device.source.sent == 0


def test_what_serves_or_is_gone_back_to_is_not_asked_for_its_memory(device, repository):
    memory = machine_facts(device.layout.root).memory_bytes
    bundle = heavy(repository, 1, memory)
    commit(device, make_release("big", bundle))
    size(device)
    commit(device, make_release("big-too", bundle, repository.adapter(11)))


def test_a_manifest_that_cannot_be_had_is_staging_s_to_tell(device, repository):
    size(device)
    bundle = repository.bundle(1, 120_000)
    (repository.root / "manifests" / f"{bundle.digest[7:]}.json").unlink()
    device.assign(make_release("gone", bundle))
    assert device.settle().phase is Phase.FAILED
