"""A batch on the reference engine: the bounds it keeps."""

from __future__ import annotations

import threading

from remora_agent.batch.document import BatchDocument, BatchRequest, BatchSettings
from remora_agent.batch.runner import run_batch
from remora_agent.local_host import HostSettings, LocalHost
from remora_agent.runtime.options import RuntimeOptions
from remora_agent.serving.call import Message
from remora_agent.serving.router import Router
from remora_agent.serving.served_model import ServedModel
from tests.support.serving import ReferenceEngines, World


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
