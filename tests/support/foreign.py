"""ONNX decoders that Remora did not export, and how they answer.

    model = torchscript_export(checkpoint, tmp_path / "model.onnx")     # torch.onnx, no onnxscript
    logits = answers(model, tokens, feed)                               # [rows, s, vocab]

Owns running foreign graphs; knows nothing of how a bank gets into them.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from remora_contract.targets import AdapterTarget

OPSET = 20  # the newest that torch's TorchScript exporter writes
MODULES = re.compile(r"layers\.(\d+)\.(?:self_attn|mlp)\.(\w+?)_proj\.lora_A\.weight")
PARTS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


def torchscript_export(checkpoint: Path, path: Path, dtype: str = "float32") -> Path:
    """torch.onnx's older exporter: nodes carry module paths, weights become onnx::MatMul_7."""
    import torch

    axes = {0: "batch", 1: "sequence"}
    with _decoder(checkpoint, dtype) as (model, inputs), _quiet():
        torch.onnx.export(
            model,
            inputs,
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_axes=dict.fromkeys(("input_ids", "attention_mask", "logits"), axes),
        )
    return path


def dynamo_export(checkpoint: Path, path: Path) -> Path:
    """torch.onnx's exporter of today; needs onnxscript."""
    import torch

    axes = {0: "batch", 1: "sequence"}
    with _decoder(checkpoint, "float32") as (model, inputs), _quiet():
        torch.onnx.export(
            model,
            inputs,
            str(path),
            dynamo=True,
            verbose=False,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes=(axes, axes),
        )
    return path


@contextlib.contextmanager
def _decoder(checkpoint: Path, dtype: str) -> Iterator[tuple[Any, Any]]:
    """The checkpoint as a module of (input_ids, attention_mask) -> logits, and example inputs."""
    import torch
    import transformers

    class Decoder(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).logits

    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    ids = torch.arange(14).reshape(2, 7)
    yield Decoder(model.eval()), (ids, torch.ones_like(ids))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters warn of themselves and print; tests turn warnings into errors."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def answers(
    model: Path, tokens: np.ndarray, feed: Mapping[str, np.ndarray] | None = None
) -> np.ndarray:
    """Logits [rows, s, vocab] from ONNX Runtime, nothing optimised (it would compute some weights'
    products in int8); an empty cache where the graph wants one."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    inputs = dict(feed or {})
    for value in session.get_inputs():
        if value.name not in inputs:
            inputs[value.name] = _plain_input(value, tokens)
    return session.run([session.get_outputs()[0].name], inputs)[0]


def _plain_input(value: Any, tokens: np.ndarray) -> np.ndarray:
    rows, length = tokens.shape
    if value.name == "input_ids":
        return tokens
    if value.name == "attention_mask":
        return np.ones((rows, length), np.int64)
    if value.name == "position_ids":
        return np.tile(np.arange(length, dtype=np.int64), (rows, 1))
    if value.name.startswith("past_key_values"):
        sizes = {"batch_size": rows, "past_sequence_length": 0, "kv_cache_dim": 16}
        shape = [d if isinstance(d, int) else sizes[d] for d in value.shape]
        return np.zeros(shape, np.float32)
    raise AssertionError(f"what to feed for {value.name}?")


def peft_tensors(peft_dir: Path) -> dict[AdapterTarget, tuple[np.ndarray, np.ndarray]]:
    """(a [k, r], b [r, n]) of a PEFT adapter with one alpha; a fused module's B is cut into its
    parts by `widths` of q, k, v as the tests' checkpoints have them."""
    from safetensors.numpy import load_file

    config = json.loads((peft_dir / "adapter_config.json").read_text())
    root = config["r"] ** 0.5 if config["use_rslora"] else config["r"]
    stored = load_file(peft_dir / "adapter_model.safetensors")
    found: dict[AdapterTarget, tuple[np.ndarray, np.ndarray]] = {}
    for name, a in stored.items():
        if (match := MODULES.search(name)) is None:
            continue
        b = stored[name.replace("lora_A", "lora_B")].T * (config["lora_alpha"] / root)
        first, parts = 0, PARTS.get(match[2], (match[2],))
        for part, width in zip(parts, _widths(match[2], b.shape[1]), strict=True):
            pair = (a.T, b[:, first : first + width])
            found[AdapterTarget(int(match[1]), part)] = pair  # type: ignore[arg-type]
            first += width
    return found


def _widths(module: str, n: int) -> tuple[int, ...]:
    """The tests' checkpoints have two query heads for each key head."""
    return {"qkv": (n // 2, n // 4, n // 4), "gate_up": (n // 2, n // 2)}.get(module, (n,))


def projections(model: onnx.ModelProto) -> dict[AdapterTarget, onnx.NodeProto]:
    """The MatMul of each projection in a TorchScript export."""
    path = re.compile(r".*/layers\.(\d+)/(?:self_attn|mlp)/(\w+)_proj/MatMul")
    matches = ((path.fullmatch(node.name), node) for node in model.graph.node)
    return {AdapterTarget(int(m[1]), m[2]): node for m, node in matches if m}  # type: ignore[arg-type]


def reference_logits(
    checkpoint: Path, tokens: np.ndarray, peft_dir: Path | None = None
) -> np.ndarray:
    """transformers + peft in float32: [rows, s, vocab]"""
    import torch
    import transformers

    from tests.support.adapters import peft_quiet

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if peft_dir is not None:
        import peft

        with peft_quiet():
            model = peft.PeftModel.from_pretrained(model, peft_dir)
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens)).logits.numpy()
