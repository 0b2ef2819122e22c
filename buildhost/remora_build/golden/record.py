"""Records golden.json: one pass over all prompts, one decoder layer in memory at a time.

    embedding rows -> layer 0 -> ... -> layer L-1 -> final norm -> winners over the vocabulary

Prompts are padded on the right to one batch: the mask hides what comes later, so padding changes
no answer. Base model only; the adapter inputs are fed with T = 0. Owns the pass; knows no format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from remora_build.golden.dense import make_dense
from remora_build.golden.head import Winners, winners
from remora_build.golden.prompts import Prompt
from remora_build.golden.slots import SlotReader
from remora_build.golden.submodels import Cutter, shrink_cache
from remora_build.graph import layout
from remora_build.graph.decoder import DATA_FILE
from remora_build.graph.ends import EMBEDDED
from remora_build.graph.layout import Slot
from remora_contract import targets
from remora_contract.bundle import GraphSpec
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import CheckpointInvalid
from remora_contract.golden import Golden, GoldenPrompt

FORMAT_VERSION = 1
CHECKS = 16  # last positions of a prompt that are recorded
_FLOAT_INT4 = "1"  # int4 products in float32; ONNX Runtime's default also rounds activations

Hidden = NDArray[np.generic]  # [prompts, tokens, hidden] in the graph's dtype
Feed = dict[str, NDArray[np.generic]]


def record(
    bundle: Path,
    spec: DecoderSpec,
    graph: GraphSpec,
    slots: Mapping[str, Slot],
    prompts: Sequence[Prompt],
    advance: Callable[[int], None],
) -> Golden:
    """What the graph written in `bundle` answers to `prompts`; `advance(1)` after every layer.

    Raises CheckpointInvalid when a layer's answer leaves the graph's dtype.
    """
    tokens = _padded(prompts)
    last = np.array([[len(p.tokens) - 1] for p in prompts])
    hidden = _embedded(bundle / DATA_FILE, slots, tokens, spec, np.dtype(graph.dtype))
    cutter = Cutter(bundle)
    stream = EMBEDDED
    for layer in range(spec.layers):
        after = f"layers.{layer}.output"
        model = cutter.cut(after, [stream])
        shrink_cache(model, tokens.shape[1])
        make_dense(model, bundle / DATA_FILE, slots)
        hidden = _run(model, bundle, stream, hidden, last)
        _check_finite(hidden, after)
        stream = after
        advance(1)
    checked = _checked_positions(prompts)
    chosen = np.concatenate([hidden[i, at] for i, at in enumerate(checked)])
    only = np.zeros((len(chosen), 1), np.int64)
    normed = _run(cutter.cut("norm", [stream]), bundle, stream, chosen[:, None], only)
    _check_finite(normed, "norm")
    found = winners(normed.astype(np.float32), bundle / DATA_FILE, slots, spec, graph)
    with np.errstate(over="ignore"):
        _check_finite(found.first.astype(graph.dtype), "logits")
    return Golden(FORMAT_VERSION, _assembled(prompts, checked, found))


def _padded(prompts: Sequence[Prompt]) -> NDArray[np.int64]:
    """[prompts, longest], zeros on the right."""
    tokens = np.zeros((len(prompts), max(len(p.tokens) for p in prompts)), np.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt.tokens)] = prompt.tokens
    return tokens


def _embedded(
    data: Path,
    slots: Mapping[str, Slot],
    tokens: NDArray[np.int64],
    spec: DecoderSpec,
    dtype: np.dtype[np.generic],
) -> Hidden:
    """Only the rows that occur, never the table."""
    hidden = np.empty((*tokens.shape, spec.hidden), dtype)
    factor = np.array(spec.embedding_scale, dtype)
    with data.open("rb") as file:
        reader = SlotReader(file.fileno(), slots)
        for token in np.unique(tokens).tolist():
            hidden[tokens == token] = reader.rows(layout.EMBED, token, token + 1)[0] * factor
    return hidden


def _run(
    model: onnx.ModelProto,
    bundle: Path,
    stream: str,
    hidden: Hidden,
    last_index: NDArray[np.int64],
) -> Hidden:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    if not any(node.op_type == "DequantizeLinear" for node in model.graph.node):
        # Folding casts would turn every float16 weight into float32 ahead of a single run.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", _FLOAT_INT4)
    if _rounds_inputs(model):
        # Its own 8-bit products saturate on some processors; these are float32 of rounded numbers.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(bundle)
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {stream: hidden} | _base_feed(model, hidden, stream, last_index)
    result: Hidden = session.run(None, feed)[0]
    return result


def _rounds_inputs(model: onnx.ModelProto) -> bool:
    return any(node.op_type == "QuantizeLinear" for node in model.graph.node)


def _check_finite(hidden: Hidden, name: str) -> None:
    if not np.isfinite(hidden).all():
        raise CheckpointInvalid(
            f"{name} is not finite in {hidden.dtype}: the model's activations do not fit; "
            "export it with --dtype float32"
        )


def _base_feed(
    model: onnx.ModelProto, hidden: Hidden, stream: str, last_index: NDArray[np.int64]
) -> Feed:
    """Positions from 0, an empty cache, no adapters: every other input of a cut model."""
    b, s = hidden.shape[:2]
    sizes = {"b": b, "s": s, **{f"t_{group}": 0 for group in targets.ALL_GROUPS}}
    feed: Feed = {}
    for value in model.graph.input:
        if value.name == stream:
            continue
        dims = value.type.tensor_type.shape.dim
        shape = [sizes[d.dim_param] if d.dim_param else d.dim_value for d in dims]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        feed[value.name] = np.zeros(shape, dtype)
        if value.name.startswith("lora_scale."):
            feed[value.name][:] = 1
        if value.name == targets.POSITION_IDS:
            feed[value.name][:] = np.arange(s)
        if value.name == targets.LAST_INDEX:
            feed[value.name] = last_index
        if value.name == targets.SEQUENCE_LENGTH:  # prompts begin at position 0
            feed[value.name] = last_index + 1
    return feed


def _checked_positions(prompts: Sequence[Prompt]) -> list[slice]:
    return [slice(max(0, len(p.tokens) - CHECKS), len(p.tokens)) for p in prompts]


def _assembled(
    prompts: Sequence[Prompt], checked: Sequence[slice], found: Winners
) -> tuple[GoldenPrompt, ...]:
    result, begin = [], 0
    for prompt, at in zip(prompts, checked, strict=True):
        end = begin + at.stop - at.start
        rows = slice(begin, end)
        result.append(
            GoldenPrompt(
                tokens=prompt.tokens,
                expected=tuple(found.token[rows].tolist()),
                logit=tuple(found.logit[rows].tolist()),
                margin=tuple(found.margin[rows].tolist()),
                text=prompt.text,
            )
        )
        begin = end
    return tuple(result)
