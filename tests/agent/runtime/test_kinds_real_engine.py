"""DoRA, biases and experts' adapters through the whole runtime, on each engine (TensorRT's on the
emulator): requests come together, the bank holds two of four adapters, and every answer is what
transformers and peft generate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from remora_agent.bank.directory import AdapterDirectory
from remora_agent.engine.cache import EngineCache
from remora_agent.engine.opening import EngineOptions, open_engine
from remora_agent.engine.protocol import Engine
from remora_agent.runtime.model_runtime import ModelRuntime
from remora_agent.runtime.options import RuntimeOptions
from remora_build.adapters.convert import convert_adapter
from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_contract.bundle import load_bundle
from remora_contract.errors import RequestInvalid
from tests.agent.runtime.test_real_engine import COUNT, theirs
from tests.support.adapters import make_peft_adapter
from tests.support.checkpoints import make_checkpoint
from tests.support.runtime import Listener, request
from tests.support.trt_engines import Bench, build

KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True, "target_modules": ["q_proj", "v_proj", "o_proj"]},
    "biased": {"bias": "lora_only", "target_modules": ["q_proj", "k_proj"]},
    "experts": {
        "target_modules": ["o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "plain": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
}
RANK = 4
ROWS = 3
# As they come: alone, composed, and again what has left the bank meanwhile.
MIXES: list[dict[str, float]] = [
    {"dora": 1.0},
    {},
    {"biased": 1.0},
    {"experts": 1.0},
    {"dora": 1.0},
    {"plain": 0.5, "experts": 1.5},
    {"plain": 1.0},
    {},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """Checkpoint, bundle and adapters below one folder."""
    root = tmp_path_factory.mktemp("kinds")
    checkpoint = make_checkpoint(root / "checkpoint", "qwen2_moe", seed=5)
    options = ExportOptions(
        dtype="float32",
        max_context=96,
        max_bank_rank=2 * RANK,
        adapt=("experts",),
        dora=True,
        adapter_bias=True,
        golden=False,
    )
    export_checkpoint(checkpoint, root / "bundle", options)
    peft = {}
    for seed, (name, kind) in enumerate(KINDS.items()):
        peft[name] = make_peft_adapter(checkpoint, root / f"{name}.peft", seed=seed, r=RANK, **kind)
        convert_adapter(peft[name], root / name, base=root / "bundle")
    return root, peft


@pytest.fixture(scope="module")
def engines(made: tuple[Path, dict[str, Path]]) -> dict[str, Engine]:
    """The emulated one last: it links the weights, and no checker reads linked ones."""
    root, _ = made
    options = EngineOptions(rows=ROWS, threads=1)
    found = {"onnxruntime": open_engine(root / "bundle", EngineCache(root / "e", 1 << 40), options)}
    entry = build(root / "bundle", root / "emulated", rows=ROWS, shortlist=16)
    return {**found, "tensorrt": Bench(root / "bundle", entry).open(rows=ROWS)}


@pytest.fixture(scope="module", params=["onnxruntime", "tensorrt"])
def runtime(
    request: pytest.FixtureRequest,
    made: tuple[Path, dict[str, Path]],
    engines: dict[str, Engine],
) -> Iterator[ModelRuntime]:
    root, peft = made
    bundle = load_bundle(root / "bundle")
    directory = AdapterDirectory(bundle)
    for name in peft:
        directory.register(name, "r1", root / name)
    options = RuntimeOptions(prefill_chunk=8)
    engine = engines[request.param]
    runtime = ModelRuntime.open(engine, bundle, root / "bundle", directory, options)
    yield runtime
    runtime.close()


def test_every_request_is_answered_as_peft_does_whatever_runs_beside_it(
    made: tuple[Path, dict[str, Path]], runtime: ModelRuntime
):
    root, peft = made
    cases = [(tuple(range(3 + i, 9 + 3 * i)), mix) for i, mix in enumerate(MIXES)]
    heard = []
    for i, (prompt, mix) in enumerate(cases):
        heard.append(Listener())
        runtime.submit(request(f"{i}", prompt, COUNT, mix), heard[-1])
    for listener, (prompt, mix) in zip(heard, cases, strict=True):
        assert listener.wait(60).tokens == theirs(root / "checkpoint", peft, prompt, mix), mix


def test_a_weighted_dora_adapter_ends_its_own_request_alone(
    made: tuple[Path, dict[str, Path]], runtime: ModelRuntime
):
    root, peft = made
    beside, weighted = Listener(), Listener()
    runtime.submit(request("beside", (3, 4, 5), COUNT, {"dora": 1.0}), beside)
    runtime.submit(request("weighted", (3, 4, 5), COUNT, {"dora": 0.5}), weighted)
    assert isinstance(weighted.wait(60).error, RequestInvalid)
    wanted = theirs(root / "checkpoint", peft, (3, 4, 5), {"dora": 1.0})
    assert beside.wait(60).tokens == wanted
