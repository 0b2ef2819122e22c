"""What the lease's holder uploads is what it holds the lease for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

from remora_agent.control.activation import Desired, Record
from remora_agent.control.fetch import Pace
from remora_agent.control.interrupt import Interrupt
from remora_agent.control.pacing import RateLimit
from remora_agent.control.sharing.pending import Pending, PendingStore
from remora_agent.control.sharing.upload import Sharer
from remora_agent.control.state import Database
from remora_contract.bundle import BundleFile
from remora_contract.device_phase import Phase
from remora_contract.digests import canonical_json, digest_bytes
from remora_contract.engine import ENGINE_JSON, EngineDocument, EngineKey
from tests.support.scripted_host import ScriptedHost

LEASED = EngineKey((BundleFile("model.onnx", 9, digest_bytes(b"graph")),), {"backend": "x"})
SECOND = dataclasses.replace(LEASED, recipe={"backend": "x", "dialect": "legacy"})


def test_an_engine_of_the_second_graph_is_not_passed_off_as_that_of_the_first(tmp_path: Path):
    """The device leased the native graph's build and had to build the legacy one."""
    folder = tmp_path / "engine"
    folder.mkdir()
    plan = BundleFile("engine.plan", 4, digest_bytes(b"plan"))
    (folder / ENGINE_JSON).write_bytes(canonical_json(EngineDocument(SECOND, (plan,), {})))
    told: list[tuple[object, ...]] = []
    calls = SimpleNamespace(
        give_up=lambda *given: told.append(given),
        offer=lambda *given: told.append(("offered", *given)),
    )
    host = ScriptedHost()
    host.built = folder
    pending = PendingStore(Database(tmp_path / "state.db"))
    pending.begin(Pending(7, digest_bytes(b"bundle"), canonical_json(LEASED).decode(), 60.0))
    desired = Desired(7, "r-1", "{}", "", 0.0, is_rollback=False)
    record = Record(desired, Phase.COMMITTED, 0.0)
    events: list[str] = []
    sharer = Sharer(
        lambda: calls,
        host,
        SimpleNamespace(artifact=lambda digest: tmp_path / "bundle"),
        pending,
        lambda: record,
        Pace(Interrupt(), lambda: 0.0, lambda: 1.0),
        RateLimit(None, 0.0),
        lambda name, detail: events.append(name),
    )
    sharer.once()
    ((key, blames_model, why),) = told
    assert (key, blames_model) == (LEASED.digest, True)
    assert "another graph" in str(why)
    assert events == ["engine.not_uploaded"] and pending.get() is None
