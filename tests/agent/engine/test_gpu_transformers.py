"""The TensorRT engine on a real GPU against transformers and PEFT: float16 within 2e-2, and the
same greedy tokens where transformers' two best are further apart than that.

    pytest -m gpu tests/agent/engine/test_gpu_transformers.py     benchmarks/gpu.sh runs it too

Without a GPU every test is skipped and says what is missing; with REMORA_GPU_EMULATED=1 they run on
the emulators.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from remora_agent.bank.weights import load_weights
from remora_agent.engine.protocol import Engine, Mix, MixEntry, RowStep
from remora_agent.engine.trt.module import TRT_BACKENDS
from remora_build.adapters.convert import convert_adapter
from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_contract.bundle import load_bundle
from remora_contract.errors import Unavailable, Unsupported
from tests.buildhost.test_adapter_logits import reference
from tests.support import gpu
from tests.support.adapters import make_peft_adapter
from tests.support.checkpoints import make_checkpoint

pytestmark = pytest.mark.gpu

FAMILIES = ("llama", "qwen3", "gemma2")
# Heads as large as TensorRT's fused attention wants them.
SIZES = {"hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "intermediate": 384}
OPTIONS = ExportOptions(dtype="float16", max_context=64, max_bank_rank=32, golden=False)
VOCAB, PROMPT, STEPS = 320, 12, 32
CLOSE = 2e-2


@dataclass(frozen=True)
class World:
    checkpoint: Path
    adapter: Path  # as PEFT saved it
    engine: Engine
    mixes: tuple[Mix, Mix]  # without and with the adapter


@pytest.fixture(
    scope="module", params=[(b, f) for b in TRT_BACKENDS for f in FAMILIES], ids="-".join
)
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    backend, family = request.param
    root = tmp_path_factory.mktemp(f"{backend}-{family}")
    checkpoint = make_checkpoint(root / "checkpoint", family, seed=3, dtype="float16", **SIZES)
    export_checkpoint(checkpoint, root / "bundle", OPTIONS)
    try:
        engines = gpu.engines(backend, root / "bundle", root)
    except (Unavailable, Unsupported) as e:
        pytest.skip(str(e))
    adapter = make_peft_adapter(checkpoint, root / "peft", seed=7, r=8, dtype="float16")
    convert_adapter(adapter, root / "adapter", base=root / "bundle")
    engine = engines.open()
    weights = load_weights(root / "adapter", load_bundle(root / "bundle"))
    handle = engine.add_adapter(engine.prepare(weights))
    yield World(checkpoint, adapter, engine, ((), (MixEntry(handle, 1.0),)))
    engine.close()


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
def test_logits_and_greedy_tokens_are_those_of_transformers(world: World, adapted: bool):
    engine, mix = world.engine, world.mixes[adapted]
    drawn = np.random.default_rng(5).integers(3, VOCAB, PROMPT)
    tokens = [int(t) for t in drawn]
    found = [engine.prefill(1, drawn, 0, mix).copy()]
    for _ in range(STEPS):
        tokens.append(int(found[-1].argmax()))
        found.append(engine.decode([RowStep(1, tokens[-1], len(tokens) - 1, mix)])[0].copy())
    adapters = [world.adapter] if adapted else []
    wanted = reference(world.checkpoint, np.array([tokens]), *adapters)[0, PROMPT - 1 :]
    room = CLOSE * max(1.0, float(np.abs(wanted).max()))
    assert np.abs(np.array(found) - wanted).max() <= room
    second, best = np.sort(wanted, axis=1)[:, -2:].T
    sure = best - second > 2 * room
    assert np.array_equal(np.array(found)[sure].argmax(1), wanted[sure].argmax(1))
    assert sure.sum() > STEPS // 4, "most of it would prove nothing"
