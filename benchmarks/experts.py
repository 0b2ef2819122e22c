"""Measures that a mixture reads only the experts a token chose: decode steps of one portable graph
on ONNX Runtime, with ever more experts of which ever four are active.

    python benchmarks/experts.py [--work DIR] [--dtype float32] [--int4-block 32]

A step's time must follow the active experts, not how many there are.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
from export import COMMON, Shape, make_checkpoint
from rich.console import Console
from rich.table import Table

from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_contract import targets
from remora_contract.bundle import GRAPH_FILE, Bundle

MIXTURES = ((4, 4), (16, 4), (64, 4), (64, 16))  # experts, active
PROMPT, STEPS, CONTEXT = 512, 24, 640


def config(count: int, active: int) -> dict[str, object]:
    return COMMON | {
        "model_type": "qwen3_moe",
        "hidden_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 2048,
        "moe_intermediate_size": 512,
        "num_experts": count,
        "num_experts_per_tok": active,
        "norm_topk_prob": True,
        "vocab_size": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
    }


class Stepper:
    """One row of the graph as it was exported."""

    def __init__(self, directory: Path, bundle: Bundle) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(directory / GRAPH_FILE), options, providers=["CPUExecutionProvider"]
        )
        shape = (1, bundle.decoder.kv_heads, CONTEXT, bundle.decoder.head_dim)
        self._cache = {
            value.name: np.zeros(shape, bundle.graph.dtype)
            for value in self._session.get_inputs()
            if value.name.startswith("past_")
        }
        self._names = [value.name for value in self._session.get_outputs()]
        self._length = 0

    def seconds(self, tokens: np.ndarray) -> float:
        count = tokens.shape[1]
        feed = {
            targets.INPUT_IDS: tokens,
            targets.POSITION_IDS: np.arange(self._length, self._length + count)[None],
            targets.LAST_INDEX: np.array([[count - 1]]),
            **self._cache,
        }
        began = time.perf_counter()
        results = self._session.run(None, feed)
        taken = time.perf_counter() - began
        found = dict(zip(self._names, results, strict=True))
        self._cache = {n: found[n.replace("past_", "present_")] for n in self._cache}
        self._length += count
        return taken


def main() -> None:
    arguments = _arguments()
    table = Table(title=f"Mixtures on ONNX Runtime {onnxruntime.__version__}, {arguments.dtype}")
    for column in ("experts", "active", "weights MB", f"prefill {PROMPT} s", "step ms", "RSS MB"):
        table.add_column(column, justify="right")
    for count, active in MIXTURES:
        with tempfile.TemporaryDirectory(dir=arguments.work, prefix="experts-") as work:
            table.add_row(*measured(Path(work), count, active, arguments))
    Console().print(table)


def measured(work: Path, count: int, active: int, arguments: argparse.Namespace) -> list[str]:
    shape = Shape("mixture", config(count, active), 1, 0.0, None)
    make_checkpoint(work / "checkpoint", shape)
    options = ExportOptions(
        dtype=arguments.dtype,
        int4_block=arguments.int4_block,
        max_context=CONTEXT,
        max_bank_rank=0,
        golden=False,
    )
    bundle = export_checkpoint(work / "checkpoint", work / "bundle", options)
    stepper, random = Stepper(work / "bundle", bundle), np.random.default_rng(0)
    prefill = stepper.seconds(random.integers(0, 512, (1, PROMPT)))
    steps = [stepper.seconds(random.integers(0, 512, (1, 1))) for _ in range(STEPS)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    shown = (bundle.bytes / 1e6, prefill, statistics.median(steps) * 1e3, peak)
    formats = (".0f", ".2f", ".1f", ".0f")
    return [str(count), str(active), *map(format, shown, formats)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, help="where 2 GB of files may go for a while")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--int4-block", type=int, help="quantize, in blocks of this size")
    return parser.parse_args()


if __name__ == "__main__":
    main()
