"""From checkpoint to logits: the built engine against transformers and peft.

Every row of one batch has its own adapters, 32 steps long, so that these numbers also hold for
batches and for the cache. Teacher-forced with the reference's own greedy tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from remora_agent.bank.weights import load_weights
from remora_agent.engine.cache import EngineCache
from remora_agent.engine.opening import EngineOptions, open_engine
from remora_agent.engine.probe import load_golden, prove, tolerance_of
from remora_agent.engine.protocol import Engine, Mix, MixEntry, RowStep
from remora_build.adapters.convert import convert_adapter
from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_contract.bundle import GRAPH_FILE, load_bundle
from remora_contract.targets import GROUPS, PARTS
from tests.support.adapters import make_peft_adapter, peft_quiet
from tests.support.checkpoints import LLAMA3_SCALING, make_checkpoint

PROMPT = [5, 9, 200, 31, 77, 12, 260, 8, 19, 44, 3]
STEPS = 32
OPTIONS = EngineOptions(rows=4, threads=1, accuracy_level=1)
FLOAT32 = ExportOptions(dtype="float32", max_context=64, max_bank_rank=128)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": LLAMA3_SCALING},
    "qwen2": {"tied": True},
    "qwen3": {"head_dim": 32, "kv_heads": 1},
}
# Which adapters, with which weights, each row of the batch uses.
ROWS: tuple[dict[str, float], ...] = ({}, {"a": 1.0}, {"b": 1.0}, {"a": 0.6, "b": 0.7})


class Hugging:
    """A checkpoint and its adapters in transformers and peft, float32."""

    def __init__(
        self, checkpoint: Path, adapters: dict[str, Path], int4: Path | None = None
    ) -> None:
        import peft
        import torch
        import transformers

        torch.set_num_threads(1)
        base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        if int4 is not None:
            _put_stored_weights(base, int4)
        with peft_quiet():
            for name, path in adapters.items():
                if isinstance(base, peft.PeftModel):
                    base.load_adapter(path, name)
                else:
                    base = peft.PeftModel.from_pretrained(base, path, name)
        self._model = base.eval()

    def forced(self, mix: dict[str, float]) -> tuple[list[int], np.ndarray]:
        """Greedy tokens after PROMPT, and the logits [STEPS + 1, vocab] that chose them."""
        import torch

        tokens = list(PROMPT)
        with torch.no_grad(), self._mixed(mix):
            for _ in range(STEPS + 1):
                logits = self._model(torch.tensor([tokens])).logits[0]
                tokens.append(int(logits[-1].argmax()))
        return tokens[len(PROMPT) :], logits[len(PROMPT) - 1 :].numpy()

    @contextmanager
    def _mixed(self, mix: dict[str, float]) -> Iterator[None]:
        """The model with these adapters active, each one's scaling times its weight."""
        if not mix:
            with self._model.disable_adapter():
                yield
            return
        self._model.base_model.set_adapter(list(mix))
        tables = [m.scaling for m in self._model.modules() if hasattr(m, "lora_A")]
        before = [dict(table) for table in tables]
        for table in tables:
            table.update({n: table[n] * w for n, w in mix.items() if n in table})
        yield
        for table, old in zip(tables, before, strict=True):
            table.update(old)


def _put_stored_weights(model: Any, bundle_dir: Path) -> None:
    """Every projection and the head as the int4 bundle holds them, dequantized."""
    import torch

    decoder = load_bundle(bundle_dir).decoder
    stored = ir.load(bundle_dir / GRAPH_FILE).graph.initializers
    modules = dict(model.named_modules())

    def put(name: str, weight: np.ndarray) -> None:
        tensor = torch.from_numpy(np.ascontiguousarray(weight.T))
        modules[name].weight = torch.nn.Parameter(tensor, requires_grad=False)

    put("lm_head", _dequantized(stored, "head.weight"))
    for layer in range(decoder.layers):
        for group, parts in ((g, PARTS[g]) for g in GROUPS):
            packed = _dequantized(stored, f"layers.{layer}.{group}.weight")
            at = 0
            for part in parts:
                n = decoder.out_features(part)
                home = "mlp" if part in ("gate", "up", "down") else "self_attn"
                put(f"model.layers.{layer}.{home}.{part}_proj", packed[:, at : at + n])
                at += n


def _dequantized(stored: Any, name: str) -> np.ndarray:
    """[k, n] float32 = codes times the scale of their block along k."""
    codes = stored[f"{name}.q"].const_value.numpy().astype(np.float32)
    scales = stored[f"{name}.scale"].const_value.numpy().astype(np.float32)
    return codes * np.repeat(scales, len(codes) // len(scales), axis=0)


def _world(tmp_path: Path, family: str, **settings: Any) -> tuple[Path, dict[str, Path]]:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family, seed=3, **settings)
    adapters = {
        "a": make_peft_adapter(checkpoint, tmp_path / "peft_a", seed=1, r=8),
        "b": make_peft_adapter(
            checkpoint,
            tmp_path / "peft_b",
            seed=2,
            r=64,
            use_rslora=True,
            target_modules=["q_proj", "v_proj", "down_proj"],
            rank_pattern={"v_proj": 3},
        ),
    }
    return checkpoint, adapters


def _open(
    tmp_path: Path, checkpoint: Path, adapters: dict[str, Path], options: ExportOptions
) -> tuple[Engine, list[Mix]]:
    """The built engine with both adapters, and the mix of each row."""
    bundle_dir = tmp_path / "bundle"
    export_checkpoint(checkpoint, bundle_dir, options)
    bundle = load_bundle(bundle_dir)
    engine = open_engine(bundle_dir, EngineCache(tmp_path / "engines", 1 << 40), OPTIONS)
    handles = {}
    for name, path in adapters.items():
        out = tmp_path / f"adapter_{name}"
        convert_adapter(path, out, base=bundle_dir)
        handles[name] = engine.add_adapter(load_weights(out, bundle))
    mixes = [tuple(MixEntry(handles[n], w) for n, w in row.items()) for row in ROWS]
    checked = prove(engine, load_golden(bundle_dir), tolerance_of(bundle, OPTIONS))
    assert checked > 20
    return engine, mixes


def _worst(engine: Engine, mixes: list[Mix], hugging: Hugging) -> tuple[float, int]:
    """Largest difference of any logit, and how many greedy tokens differ, over all rows."""
    wanted = [hugging.forced(row) for row in ROWS]
    worst, differing = 0.0, 0
    for row, mix in enumerate(mixes):
        first = engine.prefill(row, np.array(PROMPT), 0, mix)
        worst = max(worst, float(np.abs(first - wanted[row][1][0]).max()))
        differing += int(first.argmax()) != wanted[row][0][0]
    for step in range(STEPS):
        at = len(PROMPT) + step
        steps = [RowStep(row, wanted[row][0][step], at, mix) for row, mix in enumerate(mixes)]
        logits = engine.decode(steps)
        for row in range(len(mixes)):
            worst = max(worst, float(np.abs(logits[row] - wanted[row][1][step + 1]).max()))
            differing += int(logits[row].argmax()) != wanted[row][0][step + 1]
    return worst, differing


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_agrees_with_transformers_and_peft(tmp_path: Path, family: str):
    checkpoint, adapters = _world(tmp_path, family, **FAMILIES[family])
    engine, mixes = _open(tmp_path, checkpoint, adapters, FLOAT32)
    worst, differing = _worst(engine, mixes, Hugging(checkpoint, adapters))
    engine.close()
    assert worst <= 1e-4 and differing == 0


def test_float16_agrees_within_its_precision(tmp_path: Path):
    checkpoint, adapters = _world(tmp_path, "qwen3", **FAMILIES["qwen3"])
    options = replace(FLOAT32, dtype="float16")
    engine, mixes = _open(tmp_path, checkpoint, adapters, options)
    worst, _ = _worst(engine, mixes, Hugging(checkpoint, adapters))
    engine.close()
    assert worst <= 2e-2


def test_int4_agrees_with_its_dequantized_weights(tmp_path: Path):
    checkpoint, adapters = _world(tmp_path, "llama", **FAMILIES["llama"])
    options = replace(FLOAT32, int4_block=32)
    engine, mixes = _open(tmp_path, checkpoint, adapters, options)
    worst, differing = _worst(engine, mixes, Hugging(checkpoint, adapters, tmp_path / "bundle"))
    engine.close()
    assert worst <= 1e-4 and differing == 0
