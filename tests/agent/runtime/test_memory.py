"""What is freed is really given back: the process's own memory, measured in a child."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from remora_agent.bank.directory import AdapterDirectory
from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_contract.bundle import load_bundle
from tests.support.adapters import random_tensors, write_sidecar
from tests.support.checkpoints import make_checkpoint

COUNT, RANK = 6, 256
CHILD = """
import gc, json, sys, time
from pathlib import Path
import psutil
from remora_agent.bank.directory import AdapterDirectory
from remora_agent.engine.cache import EngineCache
from remora_agent.engine.opening import EngineOptions, open_engine
from remora_agent.runtime.model_runtime import ModelRuntime
from remora_contract.bundle import load_bundle
from tests.support.runtime import Listener, request

root, count = Path(sys.argv[1]), int(sys.argv[2])
engine = open_engine(
    root / "bundle", EngineCache(root / "engines", 1 << 40), EngineOptions(rows=1, threads=1)
)
bundle = load_bundle(root / "bundle")
directory = AdapterDirectory(bundle)
names = [f"a{i}" for i in range(count)]
for name in names:
    directory.register(name, "r1", root / name)
runtime = ModelRuntime.open(engine, bundle, root / "bundle", directory)

def rss():
    gc.collect()
    return psutil.Process().memory_info().rss

def settled(limit):
    "Memory goes back beside the step thread: at most two seconds later."
    for _ in range(100):
        if rss() < limit:
            break
        time.sleep(0.02)
    return rss()

def use(name):
    heard = Listener()
    runtime.submit(request(name, (5, 6, 7), 4, {name: 1.0}), heard)
    heard.wait(60)

use(names[0])
runtime.adapters.unload(names[0])
sizes = {"before": rss()}
for round in range(3):
    for name in names:
        use(name)
    sizes["full"] = rss()
    for name in names:
        runtime.adapters.unload(name)
    sizes[f"after_{round}"] = settled(sizes["before"] + 0.05 * sizes["full"])
for name in names:
    use(name)
runtime.close()
del runtime, engine
sizes["closed"] = rss()
print(json.dumps(sizes))
"""


@pytest.mark.slow
def test_unloaded_adapters_and_a_closed_engine_give_their_memory_back(tmp_path):
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "qwen3", seed=5, **shape)
    options = ExportOptions(
        dtype="float32", max_context=64, max_bank_rank=COUNT * RANK, golden=False
    )
    export_checkpoint(checkpoint, tmp_path / "bundle", options)
    bundle = load_bundle(tmp_path / "bundle")
    directory = AdapterDirectory(bundle)
    for i in range(COUNT):
        tensors = random_tensors(bundle.decoder, seed=i, r=RANK)
        write_sidecar(tmp_path / f"a{i}", bundle.base_digest, tensors)
        record = directory.register(f"a{i}", "r1", tmp_path / f"a{i}")
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(COUNT)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rss = json.loads(done.stdout.splitlines()[-1])
    grown = rss["full"] - rss["before"]
    assert grown > COUNT * record.bank_bytes  # it was really there
    for moment in ("after_0", "after_1", "after_2", "closed"):
        kept = rss[moment] - rss["before"]
        assert kept < 0.1 * grown, (moment, kept >> 20, grown >> 20)
