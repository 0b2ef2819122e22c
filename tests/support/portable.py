"""Runs a bundle's portable graph on ONNX Runtime as it is, for comparison. Nothing is optimised by
us: what is tested is what was exported.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from remora_contract import targets
from remora_contract.bundle import GRAPH_FILE, Bundle, load_bundle

Feed = dict[str, NDArray[np.generic]]
ACCURATE_INT4 = "1"  # dequantized weights in float32; the default 4 also quantizes activations


class PortableModel:
    """One bundle, one batch of `rows` sequences with its cache."""

    def __init__(self, directory: Path, rows: int = 1) -> None:
        self.bundle: Bundle = load_bundle(directory)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", ACCURATE_INT4)
        if self.bundle.graph.quant.activations != "none":
            # ONNX Runtime's own 8-bit products saturate on processors without VNNI.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        self._session = onnxruntime.InferenceSession(
            str(directory / GRAPH_FILE), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = self._session.get_inputs()
        self._outputs = [o.name for o in self._session.get_outputs()]
        self._rows = rows
        self._dtype = np.dtype(self.bundle.graph.dtype)
        self._length = 0
        self.cache = self._empty_cache()
        self.adapter_feed: Feed = self.no_adapters()

    def no_adapters(self) -> Feed:
        """T = 0 everywhere: every adapter input the graph has, empty."""
        feed: Feed = {}
        for value in self.inputs:
            if value.name.startswith("lora_"):
                shape = [self._size(d) for d in value.shape]
                feed[value.name] = np.zeros(shape, self._dtype)
        return feed

    def _size(self, dim: int | str) -> int:
        return dim if isinstance(dim, int) else self._rows if dim == "b" else 0

    def step(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Reads tokens [rows, s] after what was read before; logits [rows, vocab] of the last."""
        rows, s = tokens.shape
        positions = np.broadcast_to(np.arange(self._length, self._length + s), (rows, s))
        self._length += s
        return self.step_at(tokens, positions)

    def step_at(
        self,
        tokens: NDArray[np.int64],
        positions: NDArray[np.int64],
        lengths: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        """The same at given positions [rows, s], which may differ from row to row, of sequences of
        `lengths` [rows]; None: the tokens end them."""
        rows, s = tokens.shape
        whole = positions[:, -1] + 1 if lengths is None else lengths
        feed = {
            targets.INPUT_IDS: tokens.astype(np.int64),
            targets.POSITION_IDS: np.ascontiguousarray(positions, dtype=np.int64),
            targets.LAST_INDEX: np.full((rows, 1), s - 1, np.int64),
            **self.cache,
            **self.adapter_feed,
        }
        if self.bundle.graph.sequence_length:
            feed[targets.SEQUENCE_LENGTH] = whole[:, None].astype(np.int64)
        results = dict(zip(self._outputs, self._session.run(None, feed), strict=True))
        self.cache = {
            name.replace("present_", "past_"): value
            for name, value in results.items()
            if name.startswith("present_")
        }
        logits: NDArray[np.float32] = results[targets.LOGITS]
        return logits

    def forced(self, tokens: NDArray[np.int64], prompt: int) -> NDArray[np.float32]:
        """Prefill of tokens[:, :prompt], then one step a token: logits [rows, steps + 1, vocab]."""
        first = self.step(tokens[:, :prompt])
        later = [self.step(tokens[:, i : i + 1]) for i in range(prompt, tokens.shape[1])]
        return np.stack([first, *later], axis=1)

    def _empty_cache(self) -> Feed:
        spec, context = self.bundle.decoder, self.bundle.graph.context
        shape = (self._rows, spec.kv_heads, context, spec.head_dim)
        names = [
            f(layer) for layer in range(spec.layers) for f in (targets.past_key, targets.past_value)
        ]
        return {name: np.zeros(shape, self._dtype) for name in names}
