"""The ONNX Runtime build: rewrite, let the runtime optimise and prepack, save what loads fast.

OUT/model.onnx   with the adapter branch, when the bundle has a bank
OUT/base.onnx    without it, reading the same weights; only where prepacked weights are in the
                 data file, because otherwise a second session would pack them a second time
OUT/plain.onnx   with factors on the layers' projections only, where the bundle takes more
OUT/model.data   weights, plain and prepacked, mapped and not read at load
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort

from remora_agent.engine.ort.base_graph import without_adapters, without_extras
from remora_agent.engine.ort.rewrite.rewrite import REWRITE_VERSION, rewrite
from remora_agent.engine.ort.windows import window_excess
from remora_agent.engine.recipe import Recipe, this_machine
from remora_agent.host import Progress
from remora_contract.bundle import GRAPH_FILE, Bundle
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import EngineFault

log = logging.getLogger(__name__)

BACKEND = "onnxruntime"
MODEL = "model.onnx"
BASE = "base.onnx"
DATA = "model.data"
PLAIN = "plain.onnx"
FACT_BASE = "base"
FACT_PLAIN = "plain"
_LOG_ERRORS = 3  # onnxruntime's severity: the runtime's warnings are about our own choices


def recipe(accuracy_level: int) -> Recipe:
    """The build of this backend on this machine. `accuracy_level`: 4 fast, 1 faithful."""
    return Recipe(BACKEND, ort.__version__, REWRITE_VERSION, accuracy_level, this_machine())


def build_ort(
    bundle_dir: Path, bundle: Bundle, recipe: Recipe, out_dir: Path, progress: Progress
) -> dict[str, Any]:
    """Writes the engine's files into `out_dir`; the facts that loading needs. In a child process.

    Raises EngineFault naming the node that is not understood, or with the runtime's words.
    """
    rewritten = out_dir.parent / "rewritten"
    rewritten.mkdir()
    progress("rewriting the graph", 0.1)
    model = ir.load(bundle_dir / GRAPH_FILE)
    windows = any(kind.window is not None for kind in bundle.decoder.kinds)
    excess = window_excess() if windows else 0
    done = rewrite(model, bundle.decoder, recipe.accuracy_level, excess)
    log.info("engine.rewritten", extra={"nodes": done.nodes, "branches": done.adapter_branches})
    _save(model, rewritten / MODEL, progress)
    del model
    progress("optimising", 0.6)
    _optimise(rewritten / MODEL, out_dir)
    progress("finishing", 0.95)
    if not done.adapter_branches:
        return {FACT_BASE: ""}
    base, plain = _save_reduced(out_dir, bundle.decoder)
    return {FACT_BASE: base} | ({FACT_PLAIN: plain} if plain else {})


def _save(model: ir.Model, path: Path, progress: Progress) -> None:
    """Tensor by tensor, the weights beside the model."""

    def saved(_: ir.TensorProtocol, info: Any) -> None:
        progress("writing weights", 0.1 + 0.5 * info.index / max(info.total, 1))

    ir.save(model, path, external_data=DATA, callback=saved)


def _optimise(model: Path, out_dir: Path) -> None:
    """Raises EngineFault when the runtime does not take the rewritten graph."""
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_ERRORS
    # All fusions are done; what is left to the runtime is constant folding and prepacking.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(out_dir / MODEL)
    for key, value in (
        ("session.optimized_model_external_initializers_file_name", DATA),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "1024"),
        ("session.save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(key, value)
    try:
        ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # the runtime's exceptions share no base class
        raise EngineFault(f"onnxruntime {ort.__version__} refuses the rewritten graph: {e}") from e


def _save_reduced(out_dir: Path, decoder: DecoderSpec) -> tuple[str, str]:
    """The names of the graph without adapters and of the one that takes nothing but factors on
    projections; "" where it would double the weights in memory, or be the whole graph."""
    proto = onnx.load(out_dir / MODEL, load_external_data=False)
    if not _prepacked(proto):
        return "", ""
    (out_dir / BASE).write_bytes(without_adapters(proto, decoder).SerializeToString())
    plain = without_extras(proto, decoder)
    if plain is None:
        return BASE, ""
    (out_dir / PLAIN).write_bytes(plain.SerializeToString())
    return BASE, PLAIN


def _prepacked(proto: onnx.ModelProto) -> bool:
    """Are the weights of all quantized products in the data file as their kernels want them?"""
    packed = {
        t.name: any(e.key.startswith("prepacked") for e in t.external_data)
        for t in proto.graph.initializer
        if t.data_location == onnx.TensorProto.EXTERNAL
    }
    weights = [n.input[1] for n in proto.graph.node if n.op_type == "MatMulNBits"]
    return all(packed.get(name, True) for name in weights)
