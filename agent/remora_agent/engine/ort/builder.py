"""The ONNX Runtime build: rewrite, let the runtime optimise and prepack, save what loads fast.

OUT/model.onnx   with the adapter branch, when the bundle has a bank
OUT/base.onnx    without it, reading the same weights; only where prepacked weights are in the
                 data file, because otherwise a second session would pack them a second time
OUT/plain.onnx   with factors on the layers' projections only, where the bundle takes more
OUT/model.data   weights, plain and prepacked, mapped and not read at load
OUT/prefill.onnx prompts' products in int8, the rest read from model.data; only where it was chosen,
                 or where the golden prompts allow it
OUT/prefill.data its weights
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort

from remora_agent.engine.ort import prefill_trial
from remora_agent.engine.ort.base_graph import without_adapters, without_extras
from remora_agent.engine.ort.engine import EngineFiles
from remora_agent.engine.ort.names import BACKEND, MODEL
from remora_agent.engine.ort.prefill_graph import PrefillFiles, write_prefill
from remora_agent.engine.ort.rewrite.rewrite import REWRITE_VERSION, rewrite
from remora_agent.engine.ort.saturation import signed_saturates
from remora_agent.engine.ort.windows import window_excess
from remora_agent.engine.prefill import PrefillChoice
from remora_agent.engine.probe import load_golden
from remora_agent.engine.recipe import Recipe, this_machine
from remora_agent.host import Progress
from remora_contract.bundle import GOLDEN_JSON, GRAPH_FILE, Bundle
from remora_contract.decoder import DecoderSpec
from remora_contract.digests import digest_bytes
from remora_contract.errors import EngineFault

log = logging.getLogger(__name__)

BASE = "base.onnx"
DATA = "model.data"
PLAIN = "plain.onnx"
PREFILL = "prefill.onnx"
PREFILL_DATA = "prefill.data"
FACT_BASE = "base"
FACT_PLAIN = "plain"
FACT_PREFILL = "prefill"  # the file of int8 prompts, or ""
FACT_PREFILL_WHY = "prefill_why"  # what decided it, in words
REWRITTEN = "rewritten"  # folder beside the result, gone after the build
_LOG_ERRORS = 3  # onnxruntime's severity: the runtime's warnings are about our own choices


def recipe(accuracy_level: int, prefill: PrefillChoice = "plain") -> Recipe:
    """The build of this backend on this machine. `accuracy_level`: 4 fast, 1 faithful."""
    return Recipe(
        BACKEND,
        ort.__version__,
        REWRITE_VERSION,
        accuracy_level,
        this_machine(),
        prefill,
        backend_build=digest_bytes(ort.get_build_info().encode()),
    )


def build_ort(
    bundle_dir: Path, bundle: Bundle, recipe: Recipe, out_dir: Path, progress: Progress
) -> dict[str, Any]:
    """Writes the engine's files into `out_dir`; the facts that loading needs. In a child process.

    Raises EngineFault naming the node that is not understood, or with the runtime's words.
    """
    rewritten = out_dir.parent / REWRITTEN
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
    progress("finishing", 0.8)
    base, plain = _save_reduced(out_dir, bundle.decoder) if done.adapter_branches else ("", "")
    facts = {FACT_BASE: base} | ({FACT_PLAIN: plain} if plain else {})
    return facts | _prefill(bundle_dir, bundle, recipe, out_dir, facts, progress)


def _prefill(
    bundle_dir: Path,
    bundle: Bundle,
    recipe: Recipe,
    out_dir: Path,
    facts: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """Int8 prompts where the recipe wants them; what became of it. Raises EngineFault when they
    were asked for and cannot be made."""
    if recipe.prefill == "plain":
        return {}
    made = PrefillFiles(MODEL, PREFILL, PREFILL_DATA)
    try:
        progress("making int8 prompts", 0.85)
        write_prefill(out_dir, made, out_dir.parent / REWRITTEN, signed=not signed_saturates())
        progress("comparing int8 prompts", 0.9)
        kept, why = _tried(bundle_dir, bundle, out_dir, facts)
    except EngineFault as e:
        if recipe.prefill == "int8":
            raise
        kept, why = False, str(e)
    log.info("engine.prefill_decided", extra={"int8": kept, "why": why})
    if kept or recipe.prefill == "int8":
        return {FACT_PREFILL: PREFILL, FACT_PREFILL_WHY: why}
    for name in (PREFILL, PREFILL_DATA):
        (out_dir / name).unlink(missing_ok=True)
    return {FACT_PREFILL_WHY: why}


def _tried(
    bundle_dir: Path, bundle: Bundle, out_dir: Path, facts: dict[str, Any]
) -> tuple[bool, str]:
    """Whether the golden prompts allow it, in words."""
    if bundle.file(GOLDEN_JSON) is None:
        return False, "the bundle has no golden prompts to hold int8 prompts against"
    base, plain = (facts.get(fact) or None for fact in (FACT_BASE, FACT_PLAIN))
    files = EngineFiles(out_dir, "", base, plain)
    return prefill_trial.allowed(
        prefill_trial.trial(files, PREFILL, bundle, load_golden(bundle_dir))
    )


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
