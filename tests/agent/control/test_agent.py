"""The agent's threads against a controller over real mutual TLS."""

from __future__ import annotations

import shutil
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from remora_agent.config import AgentConfig, LimitsConfig, TelemetryConfig
from remora_agent.control.agent import Agent, Supervisor
from remora_agent.control.certificates import make_request
from remora_agent.control.compose import Timing, compose
from remora_agent.control.identity import load_identity, replace_certificate
from remora_agent.control.join import JoinPlan, join
from remora_agent.control.layout import StateLayout, exclusive
from remora_agent.control.pacing import Backoff
from remora_agent.control.service import run_agent
from remora_agent.control.sync import SyncLoop
from remora_contract.errors import Cancelled, Forbidden, InternalFault, Refused, Unavailable
from remora_contract.trt_memory import GpuMemory
from tests.support.fake_controller import FakeController
from tests.support.repository import Repository, make_release
from tests.support.scripted_host import ScriptedHost

WAIT_S = 60.0  # for what comes at once where nothing else runs
FAST = Timing(Backoff(0.05, 0.2), Backoff(0.02, 0.1))


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path / "repository")


@pytest.fixture
def controller(repository):
    made = FakeController(repository.root).start()
    yield made
    made.stop()


@pytest.fixture
def config(tmp_path):
    return AgentConfig(
        state_dir=str(tmp_path / "state"),
        labels={"site": "lab"},
        telemetry=TelemetryConfig(interval_s=0.1, metrics_listen=""),
        limits=LimitsConfig(disk_floor_bytes=0),
    )


def joined(controller: FakeController, config: AgentConfig):
    layout = StateLayout(config_path(config))
    layout.create()
    if not layout.identity.exists():
        plan = JoinPlan(controller.enrolment_address, controller.token, layout.identity, {})
        join(plan)
    return load_identity(layout.identity)


def config_path(config: AgentConfig) -> Path:
    return Path(config.state_dir)


class Running:
    def __init__(self, config: AgentConfig, identity, host: ScriptedHost | None = None) -> None:
        self.host = host or ScriptedHost()
        self.parts = compose(config, identity, self.host, FAST, openers=[])
        self.ready = threading.Event()
        self.errors: list[BaseException] = []
        self.agent = Agent(self.parts, Supervisor(ready=self.ready.set, tick_s=0.05))
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.agent.run()
        except InternalFault as e:
            self.errors.append(e)

    def start(self) -> Running:
        self.thread.start()
        return self

    def stop(self) -> None:
        self.agent.stop.set()
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()


@contextmanager
def running(controller: FakeController, config: AgentConfig, host: ScriptedHost | None = None):
    made = Running(config, joined(controller, config), host).start()
    try:
        yield made
    finally:
        made.stop()
        made.parts.database.close()


def test_a_release_rolls_out_over_mutual_tls(controller, config, repository):
    release = make_release("first", repository.bundle(), repository.adapter())
    host = ScriptedHost()
    host.gpu = GpuMemory(8 << 30, is_shared=True)
    with running(controller, config, host) as agent:
        assert agent.ready.wait(WAIT_S)
        controller.assign(release)
        state = controller.wait_phase("COMMITTED")
        assert state.running_release_id == release.release_id
        assert [a.name for a in state.adapters] == ["adapter0"]
        sync = controller.wait(lambda s: bool(s.metrics))
        assert sync.labels == {"site": "lab"}
        assert sync.facts.machine_id and sync.facts.agent_version
        assert (sync.facts.gpu_memory_bytes, sync.facts.gpu_shares_memory) == (8 << 30, True)
    names = [controller.events[seq].name for seq in sorted(controller.events)]
    assert names[0] == "release.assigned"
    assert "artifact.fetched" in names
    assert agent.host.drained.is_set()


def test_phases_are_reported_while_they_last(controller, config, repository):
    release = make_release("first", repository.bundle())
    go_on = threading.Event()
    host = ScriptedHost()

    def half_way(assignment, progress):
        progress("building", 0.5)
        go_on.wait(2 * WAIT_S)

    host.hooks["build"] = half_way
    with running(controller, config, host):
        controller.assign(release)
        state = controller.wait(
            lambda s: s.reported.phase == "BUILDING" and s.reported.progress == 0.5
        ).reported
        assert state.running_release_id == ""
        go_on.set()
        controller.wait_phase("COMMITTED")


def test_a_poke_makes_the_device_sync_at_once(controller, config, repository):
    controller.next_sync_after_s = 3600.0
    with running(controller, config):
        controller.wait(lambda s: True)
        # The Watch stream stands when the first poke arrives; keep assigning until then.
        release = make_release("first", repository.bundle(1, 1000))
        for _ in range(50):
            controller.assign(release)
            with controller.changed:
                if controller.changed.wait_for(
                    lambda: any(s.reported.phase == "COMMITTED" for s in controller.syncs), 0.5
                ):
                    return
        raise AssertionError("no poke came through")


def test_a_controller_that_restarts_is_found_again(controller, config, repository):
    with running(controller, config) as agent:
        controller.wait(lambda s: True)
        controller.stop()
        agent.parts.reconciler._effects.emit("test.offline", {"n": 1})
        controller.start()
        controller.assign(make_release("first", repository.bundle()))
        controller.wait_phase("COMMITTED")
    assert "test.offline" in {e.name for e in controller.events.values()}


def test_a_controller_that_dies_during_the_download_is_waited_for(controller, config, repository):
    manifest = repository.bundle()
    controller.faults.cut_after = {manifest.files[-1].chunks[1].digest: 20_000}
    with running(controller, config):
        controller.assign(make_release("first", manifest))
        controller.wait_phase("COMMITTED")
    assert controller.sent_bytes == manifest.bytes, "resumed at the byte"


def test_an_unreachable_controller_at_boot_does_not_delay_serving(controller, config, repository):
    release = make_release("first", repository.bundle())
    with running(controller, config):
        controller.assign(release)
        controller.wait_phase("COMMITTED")
    controller.stop()
    with running(controller, config) as agent:
        assert agent.ready.wait(WAIT_S)
        assert agent.host.serving().release_id == release.release_id
        agent.parts.reconciler._effects.emit("test.offline", {})
        agent.parts.telemetry.tick()
        controller.start()
        with controller.changed:
            assert controller.changed.wait_for(
                lambda: "test.offline" in {e.name for e in controller.events.values()}, WAIT_S
            )


def test_two_agents_with_one_identity_are_quarantined_and_serve_on(
    controller, config, repository, tmp_path
):
    release = make_release("first", repository.bundle())
    with running(controller, config) as first:
        controller.assign(release)
        controller.wait_phase("COMMITTED")
        copied = replace(config, state_dir=str(tmp_path / "copy"))
        (tmp_path / "copy").mkdir()
        shutil.copytree(tmp_path / "state" / "identity", tmp_path / "copy" / "identity")
        with running(controller, copied) as second:
            with controller.changed:
                assert controller.changed.wait_for(lambda: controller.quarantined, WAIT_S)
            assert second.ready.wait(WAIT_S)
            for agent in (first, second):
                agent.parts.sync.poke()
            assert first.host.serving().release_id == release.release_id
            controller.assign(make_release("second", repository.bundle(2)))
        assert first.host.serving().release_id == release.release_id
        assert not first.errors


@pytest.mark.parametrize("error", [Refused("quarantined"), Forbidden("dev-1 was removed")])
def test_a_device_that_is_set_aside_says_it_once_and_asks_rarely(controller, config, caplog, error):
    host = ScriptedHost()
    parts = compose(config, joined(controller, config), host, FAST, openers=[])
    controller.faults.sync_error = error
    assert parts.sync.once() >= 30.0
    assert parts.sync.once() >= 30.0
    assert caplog.messages.count("controller.refused") == 1
    controller.faults.sync_error = None
    assert parts.sync.once() < 30.0
    parts.client.close()
    parts.database.close()


def test_a_certificate_is_renewed_in_use_and_stored(controller, config, repository):
    controller.life = timedelta(minutes=6)  # issued five minutes ago: past two thirds
    identity = joined(controller, config)
    with running(controller, config) as agent:
        with controller.changed:
            assert controller.changed.wait_for(lambda: bool(controller.renewals), WAIT_S)
        before = len(controller.syncs)
        controller.assign(make_release("first", repository.bundle()))
        controller.wait_phase("COMMITTED")
        assert len(controller.syncs) > before
        assert agent.parts.client.address == controller.fleet_address
    renewed = load_identity(StateLayout(config_path(config)).identity)
    assert renewed.certificate_pem != identity.certificate_pem
    assert renewed.key_pem == identity.key_pem
    assert len(controller.renewals) == 1


def test_a_device_that_comes_back_after_its_certificate_expired_renews_it(
    controller, config, repository
):
    identity = joined(controller, config)
    request = make_request(identity.key_pem, identity.device_id)
    expired = controller.ca.device(
        identity.device_id, request, timedelta(days=30), age=timedelta(days=90)
    )
    directory = StateLayout(config_path(config)).identity
    replace_certificate(directory, expired, identity.ca_pem)
    with running(controller, config):
        controller.assign(make_release("first", repository.bundle()))
        controller.wait_phase("COMMITTED")
    assert [r.certificate_pem for r in controller.expired_renewals] == [expired]
    renewed = load_identity(directory)
    assert renewed.certificate_pem not in (expired, identity.certificate_pem)
    assert renewed.key_pem == identity.key_pem


def test_a_certificate_that_cannot_be_proven_is_not_stored(controller, config, monkeypatch):
    controller.life = timedelta(minutes=6)
    identity = joined(controller, config)
    tried = threading.Event()

    def refuse(self, client):
        tried.set()
        raise Unavailable("the new certificate does not work")

    monkeypatch.setattr(SyncLoop, "exchange_with", refuse)
    with running(controller, config):
        assert tried.wait(WAIT_S)
        count = len(controller.syncs)
        with controller.changed:
            assert controller.changed.wait_for(lambda: len(controller.syncs) > count, WAIT_S)
    assert load_identity(StateLayout(config_path(config)).identity) == identity


def test_a_thread_that_dies_of_a_bug_ends_the_agent_loudly(controller, config, monkeypatch):
    made = Running(config, joined(controller, config))
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    monkeypatch.setattr(
        made.parts.watch, "run", lambda: (_ for _ in ()).throw(ZeroDivisionError("bug"))
    )
    made.start()
    made.thread.join(WAIT_S)
    assert [str(e) for e in made.errors] == [
        "the agent's watch thread ended; the log above says why"
    ]
    assert made.host.drained.is_set()
    made.parts.database.close()


def test_a_step_thread_that_stands_still_ends_the_agent(controller, config):
    host = ScriptedHost()
    host.well = False
    made = Running(config, joined(controller, config), host).start()
    made.thread.join(WAIT_S)
    assert len(made.errors) == 1
    made.parts.database.close()


def test_one_agent_for_a_state_directory(tmp_path):
    layout = StateLayout(tmp_path)
    with exclusive(layout):
        second = exclusive(layout)
        with pytest.raises(Refused, match="another remora-agent"):
            second.__enter__()
    with exclusive(layout):
        pass


def test_the_watchdog_is_not_fed_while_what_serves_is_unwell(controller, config):
    host, alive = ScriptedHost(), []
    host.well = False
    made = Running(config, joined(controller, config), host)
    made.agent.supervisor = Supervisor(alive=lambda: alive.append(1), tick_s=0.05)
    made.start()
    made.thread.join(WAIT_S)
    assert made.errors and not alive
    made.parts.database.close()


def test_a_stop_cancels_the_build_and_the_next_start_resumes_it(controller, config, repository):
    release = make_release("first", repository.bundle())
    joined(controller, config)
    building, stop = threading.Event(), threading.Event()

    @contextmanager
    def building_host(config, layout, cancelled):
        host = ScriptedHost()

        def build(assignment, progress):
            building.set()
            while not cancelled():
                time.sleep(0.01)
            raise Cancelled("the build was cancelled")

        host.hooks["build"] = build
        yield host

    runner = threading.Thread(target=run_agent, args=(config, stop, building_host))
    runner.start()
    try:
        controller.assign(release)
        assert building.wait(WAIT_S)
    finally:
        stop.set()
        runner.join(WAIT_S)
    assert not runner.is_alive()
    assert "release.failed" not in [e.name for e in controller.events.values()]
    with running(controller, config):
        controller.wait_phase("COMMITTED")
