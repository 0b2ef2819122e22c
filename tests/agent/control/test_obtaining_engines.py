"""Before a build: another device's engine is taken where it is good, and nothing about sharing can
cost a release."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from remora_agent.control.activation import Desired, Record
from remora_agent.control.fetch import Pace
from remora_agent.control.interrupt import Interrupt
from remora_agent.control.sharing import obtain
from remora_agent.control.sharing.calls import ToBuild, ToBuildAlone, ToFetch, ToWait
from remora_agent.control.sharing.obtain import EngineSharing, Origin
from remora_agent.control.sharing.pending import PendingStore
from remora_agent.control.staging import Fetched
from remora_agent.control.state import Database
from remora_agent.host import Assignment
from remora_contract.bundle import BundleFile
from remora_contract.device_phase import Phase
from remora_contract.digests import digest_bytes
from remora_contract.engine import EngineKey
from remora_contract.errors import (
    ArtifactInvalid,
    Cancelled,
    Exhausted,
    Forbidden,
    NotFound,
    RemoraError,
    Unavailable,
)
from tests.support.scripted_host import ScriptedHost

ENGINE = digest_bytes(b"engine")
KEY = EngineKey((BundleFile("model.onnx", 1000, digest_bytes(b"graph")),), {"backend": "x"})
FETCH = ToFetch(ENGINE, 500, "d-1")
BUILD = ToBuild(60.0, "nobody of its class has built it yet")


class Clock:
    """Time that passes only while somebody waits for it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.cancel_at = float("inf")

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now >= self.cancel_at:
            raise Cancelled("a newer assignment")


class Controller:
    """Answers claims in order, the last one for ever; remembers what was rejected."""

    def __init__(self, *answers: object) -> None:
        self._answers = list(answers)
        self.rejected: list[tuple[str, str]] = []

    def claim(self, key_json: bytes) -> object:
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, RemoraError):
            raise answer
        return answer

    def reject(self, key_digest: str, engine_digest: str, why: str) -> None:
        self.rejected.append((engine_digest, why))


class Stager:
    def __init__(self) -> None:
        self.error: RemoraError | None = None
        self.bytes = 500

    def manifest(self, digest: str) -> SimpleNamespace:
        return SimpleNamespace(bytes=self.bytes)

    def stage(self, wanted: object, progress: object) -> list[Fetched]:
        if self.error is not None:
            raise self.error
        return [Fetched(ENGINE, "engine", 480, 0.1)]


class World:
    def __init__(self, folder: Path, *answers: object) -> None:
        self.controller, self.stager, self.clock = Controller(*answers), Stager(), Clock()
        self.host, self.events = ScriptedHost(), []
        self.host.missing = KEY
        folder.mkdir(exist_ok=True)
        self.pending = PendingStore(Database(folder / "state.db"))
        interrupt = Interrupt()
        interrupt.sleep = self.clock.sleep  # type: ignore[method-assign]
        self.sharing = EngineSharing(
            lambda: self.controller,
            self.host,
            self.stager,
            Pace(interrupt, lambda: self.clock.now, lambda: 1.0),
            self.pending,
            lambda name, detail: self.events.append((name, detail)),
        )
        desired = Desired(7, "r-1", "{}", "", 0.0, is_rollback=False)
        self.record = Record(desired, Phase.BUILDING, 0.0)
        self.assignment = Assignment("r-1", digest_bytes(b"bundle"), folder)
        self.holds: list[str] = []

    def obtain(self) -> Origin:
        def progress(what: str, fraction: float) -> None:
            hold = self.sharing.holding(self.record)
            if hold is not None and (not self.holds or self.holds[-1] != hold.why):
                self.holds.append(hold.why)

        return self.sharing.obtain(self.record, self.assignment, progress)


def test_a_good_engine_is_taken_and_told(tmp_path: Path):
    world = World(tmp_path, FETCH)
    assert world.obtain() == Origin("shared", "built by d-1")
    ((name, detail),) = world.events
    assert (name, detail["built_by"], detail["bytes"]) == ("engine.fetched", "d-1", 480)


def test_a_bad_engine_is_rejected_and_the_device_builds_for_others(tmp_path: Path):
    world = World(tmp_path, FETCH, BUILD)
    world.host.untakable = "golden prompt 2 differs"
    origin = world.obtain()
    assert (origin.what, origin.leased) == ("own", True)
    assert world.controller.rejected == [(ENGINE, "golden prompt 2 differs")]
    assert world.events == []
    pending = world.pending.get()
    assert pending is not None and pending.generation == 7, "written down before the build"


def test_more_bytes_than_promised_or_than_any_engine_has_are_not_fetched(tmp_path: Path):
    for size, promised in ((501, 500), (1 << 40, 1 << 40)):
        world = World(tmp_path / str(size), dataclasses.replace(FETCH, bytes=promised), BUILD)
        world.stager.bytes = size
        assert world.obtain().what == "own"
        assert "promised were" in world.controller.rejected[0][1]
        assert world.host.calls == []


def test_damaged_bytes_are_the_engines_fault_and_a_full_disk_is_not(tmp_path: Path):
    world = World(tmp_path / "damaged", FETCH, ToBuildAlone("three attempts failed"))
    world.stager.error = ArtifactInvalid("chunk 3 is damaged")
    assert world.obtain() == Origin("own", "three attempts failed")
    assert world.controller.rejected == [(ENGINE, "chunk 3 is damaged")]
    full = World(tmp_path / "full", FETCH)
    full.stager.error = Exhausted("the disk is full")
    assert full.obtain().why.endswith("the disk is full")
    assert full.controller.rejected == []


def test_an_engine_that_went_meanwhile_is_asked_for_again(tmp_path: Path):
    world = World(tmp_path, FETCH, BUILD)
    world.stager.error = NotFound("not shared any more")
    assert world.obtain().leased
    assert world.controller.rejected == []


def test_a_device_that_waits_says_for_whom_and_no_longer_afterwards(tmp_path: Path):
    reason = "waiting for d-1 to build, 3 min left"
    world = World(tmp_path, ToWait(reason, 15.0), ToWait(reason, 15.0), FETCH)
    assert world.obtain().what == "shared"
    assert world.holds == [reason]
    assert world.clock.now == 30.0
    assert world.sharing.holding(world.record) is None


def test_nobody_waits_for_ever_whatever_the_controller_says(tmp_path: Path):
    world = World(tmp_path, ToWait("wait", 300.0))
    assert world.obtain().what == "own"
    assert obtain.MAX_WAIT_S <= world.clock.now <= obtain.MAX_WAIT_S + 300.0


def test_engines_that_are_bad_again_and_again_end_in_a_build(tmp_path: Path):
    world = World(tmp_path, FETCH)
    world.host.untakable = "wrong answers"
    assert world.obtain().why == "3 shared engines were not usable"
    assert len(world.controller.rejected) == 3


def test_a_controller_that_cannot_be_reached_costs_half_a_minute_and_one_that_refuses_nothing(
    tmp_path: Path,
):
    world = World(tmp_path / "away", Unavailable("no route"))
    assert "does not answer" in world.obtain().why
    assert 30.0 <= world.clock.now < 100.0
    refusing = World(tmp_path / "refusing", Forbidden("engine sharing is off"))
    assert refusing.obtain().why == "engines are not shared here: engine sharing is off"
    assert refusing.clock.now == 0.0


def test_a_newer_assignment_ends_the_wait(tmp_path: Path):
    world = World(tmp_path, ToWait("wait", 15.0))
    world.clock.cancel_at = 40.0
    with pytest.raises(Cancelled, match="newer"):
        world.obtain()
    assert world.sharing.holding(world.record) is None


def test_nobody_is_asked_where_the_engine_is_there(tmp_path: Path):
    world = World(tmp_path, Forbidden("must not be asked"))
    world.host.missing = None
    assert world.obtain() == Origin("own")
    world.host.missing = KEY
    world.assignment = dataclasses.replace(world.assignment, engines=(tmp_path,))
    assert world.obtain() == Origin("own")
