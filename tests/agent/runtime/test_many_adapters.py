"""Three times as many adapters as fit, on a built ONNX Runtime engine: everybody is answered, in
bounded time, and adapters are not loaded for each request anew."""

import threading
import time

import pytest

from remora_agent.bank.directory import AdapterDirectory
from remora_agent.engine.cache import EngineCache
from remora_agent.engine.opening import EngineOptions, open_engine
from remora_agent.runtime.model_runtime import ModelRuntime
from remora_agent.runtime.options import RuntimeOptions
from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_contract.bundle import load_bundle
from tests.support.checkpoints import make_checkpoint
from tests.support.runtime import Listener, add_adapter, request

RANK, PLACES, ADAPTERS, TOKENS = 4, 3, 9, 6
PROMPT = (5, 6, 7)
NAMES = [f"a{i}" for i in range(ADAPTERS)]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Opens runtimes on one bundle, each with an engine of its own."""
    root = tmp_path_factory.mktemp("many")
    checkpoint = make_checkpoint(root / "checkpoint", "qwen3", seed=5)
    options = ExportOptions(
        dtype="float32", max_context=64, max_bank_rank=PLACES * RANK, golden=False
    )
    export_checkpoint(checkpoint, root / "bundle", options)
    bundle = load_bundle(root / "bundle")
    directory = AdapterDirectory(bundle)
    for i, name in enumerate(NAMES):
        add_adapter(directory, bundle, root / name, name, "r1", seed=i, r=RANK)
    runtimes = []

    def make(patience_s):
        cache = EngineCache(root / "engines", 1 << 40)
        engine = open_engine(root / "bundle", cache, EngineOptions(rows=4, threads=1))
        settings = RuntimeOptions(patience_s=patience_s)
        runtime = ModelRuntime.open(engine, bundle, root / "bundle", directory, settings)
        runtimes.append(runtime)
        return runtime

    yield make
    for runtime in runtimes:
        runtime.close()


def ask(runtime, request_id, adapter):
    heard = Listener()
    runtime.submit(request(request_id, PROMPT, TOKENS, {adapter: 1.0}), heard)
    return heard


def test_requests_that_wait_for_nine_adapters_share_loads_and_are_each_answered_as_alone(opened):
    runtime = opened(patience_s=60.0)
    alone = {name: ask(runtime, f"alone-{name}", name).wait(60).tokens for name in NAMES}
    assert len(set(alone.values())) > 1
    before = runtime.metrics()["adapter_loads"]
    heard = [(n, ask(runtime, f"{k}-{n}", n)) for k in range(10) for n in NAMES]
    for name, listener in heard:
        assert listener.wait(60).tokens == alone[name]
    # Three of the nine may be resident from before; without turns it is one load a request.
    loads = runtime.metrics()["adapter_loads"] - before
    assert ADAPTERS - PLACES <= loads <= ADAPTERS + PLACES
    assert runtime.metrics()["adapter_leases"] == 0


def test_a_flood_for_three_adapters_does_not_keep_the_six_others_waiting(opened):
    runtime = opened(patience_s=0.2)
    stop, flooded = threading.Event(), []

    def flood(k):
        i = 0
        while not stop.is_set():
            flooded.append(ask(runtime, f"f{k}-{i}", NAMES[k % PLACES]).wait(60))
            i += 1

    threads = [threading.Thread(target=flood, args=(k,)) for k in range(3 * PLACES)]
    for thread in threads:
        thread.start()
    try:
        while len(flooded) < 30:
            time.sleep(0.01)
        heard = [ask(runtime, f"late-{n}", n) for n in NAMES[PLACES:]]
        first_s = [h.wait(60).finished.timings.time_to_first_token_s for h in heard]
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    # Six that wait, three places a turn of 0.2 s: two turns, and room for a busy machine.
    assert max(first_s) < 10.0
    assert runtime.metrics()["adapter_turns"] > 0
    assert len(flooded) > 30
