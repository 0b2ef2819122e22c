"""A batch on the reference engine: the bounds it keeps."""

from __future__ import annotations

import threading

import pytest

from remora_agent.batch.document import BatchDocument, BatchRequest, BatchSettings
from remora_agent.batch.runner import run_batch
from remora_agent.local_host import HostSettings, LocalHost
from remora_agent.runtime.options import RuntimeOptions
from remora_agent.serving.call import Message
from remora_agent.serving.router import Router
from remora_agent.serving.served_model import ServedModel
from tests.support.serving import ReferenceEngines, World


def test_a_report_that_cannot_be_made_ends_the_batch_and_harms_no_model(tmp_path):
    """As `remora-agent generate … 2>&1 | head -1` does."""

    def report(done: int) -> None:
        raise BrokenPipeError

    requests = tuple(BatchRequest((Message("user", f"{i}"),)) for i in range(4))
    settings = BatchSettings(batch_size=2, temperature=0.0, max_generate_length=2)
    router: Router[ServedModel] = Router()
    host = LocalHost(ReferenceEngines(), router)
    host.switch(World(tmp_path).assignment())
    with router.entering_blocking() as model:
        with pytest.raises(BrokenPipeError):
            run_batch(model, BatchDocument(settings, requests), None, report)
        assert model.runtime._stepper.wait_empty(60.0)
        told: list[int] = []
        outcomes = run_batch(model, BatchDocument(settings, requests), None, told.append)
    assert host.healthy() and [o.error for o in outcomes] == [None] * 4
    assert told == sorted(set(told)) and told[-1] == 4
    host.drain(5.0)


def test_a_batch_never_overflows_the_queue_it_waits_in(tmp_path):
    requests = tuple(BatchRequest((Message("user", f"{i}"),)) for i in range(20))
    settings = BatchSettings(batch_size=20, temperature=0.0, max_generate_length=2)
    engines = ReferenceEngines()
    router: Router[ServedModel] = Router()
    host = LocalHost(engines, router, HostSettings(runtime=RuntimeOptions(max_waiting=3)))
    host.switch(World(tmp_path).assignment())
    engines.gate.clear()
    opener = threading.Timer(0.3, engines.gate.set)
    opener.start()
    with router.entering_blocking() as model:
        outcomes = run_batch(model, BatchDocument(settings, requests), None)
    opener.join()
    host.drain(5.0)
    assert [o.error for o in outcomes] == [None] * 20
    assert all(o.finished for o in outcomes)
