"""Measures `remora-build export` on a random bf16 checkpoint in the shape of a published model.

    python benchmarks/export.py [--shape 0.5b|8b] [--work DIR] [--runs N] [--edgellm-python PYTHON]

Each run is a fresh process; CPU time and peak RSS are its own (os.wait4). The wall time means
something on an idle machine only. The 8b shape is sharded and takes 32 GB of disk for a while.
With --edgellm-python, TensorRT Edge-LLM's exporter of that environment runs beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from remora_build.families import naming, read_config

BOS, EOS = 0, 1
COMMON = {
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
QWEN_05B = COMMON | {
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
LLAMA_8B = COMMON | {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Shape:
    title: str
    config: dict[str, Any]
    shards: int
    goal_mb: float  # peak RSS
    goal_seconds: float | None


SHAPES = {
    "0.5b": Shape("Qwen2.5-0.5B", QWEN_05B, 1, 600.0, 10.0),
    "8b": Shape("Llama-3.1-8B", LLAMA_8B, 4, 2000.0, None),
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}
FORMS: dict[str, tuple[str, ...]] = {
    "fp16": (),
    "int4, block 32": ("--int4-block", "32"),
    "int4, block 128": ("--int4-block", "128"),
}
POOL = 1 << 23  # random numbers that weights repeat: a child's peak RSS begins at its parent's


@dataclass(frozen=True)
class Run:
    seconds: float
    cpu_seconds: float  # of all threads
    peak_mb: float  # 10^6 bytes


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="export-bench-") as work:
        checkpoint, shape = Path(work) / "checkpoint", SHAPES[arguments.shape]
        make_checkpoint(checkpoint, shape)
        title = f"Export of a {shape.title}-shaped bf16 checkpoint, golden included"
        table = Table(title=title)
        for column in ("exporter", "seconds", "CPU seconds", "peak RSS MB", "bundle MB", "goal"):
            table.add_column(column, justify="left" if column == "exporter" else "right")
        for form, flags in FORMS.items():
            row = _measure_remora(form, flags, checkpoint, Path(work), shape, arguments.runs)
            table.add_row(*row)
        table.add_row(*_measure_edgellm(arguments.edgellm_python, checkpoint, Path(work)))
        Console().print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b", help="which model's shape")
    parser.add_argument(
        "--work", type=Path, help="where 3 GB of files (8b: 32 GB) may go for a while"
    )
    parser.add_argument("--runs", type=int, default=3, help="runs of each form; the median counts")
    parser.add_argument(
        "--edgellm-python", type=Path, help="Python with tensorrt-edgellm 0.11 installed"
    )
    return parser.parse_args()


def _measure_remora(
    form: str, flags: Sequence[str], checkpoint: Path, work: Path, shape: Shape, runs: int
) -> list[str]:
    out = work / "bundle"
    program = [sys.executable, "-c", "from remora_build.cli import main; main()"]
    command = [*program, "export", str(checkpoint), str(out), "--force", "--json", *flags]
    measured = [run(command) for _ in range(runs)]
    seconds = statistics.median(r.seconds for r in measured)
    peak = max(r.peak_mb for r in measured)
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) / 1e6
    shutil.rmtree(out)
    in_time = shape.goal_seconds is None or seconds <= shape.goal_seconds
    met = "met" if in_time and peak <= shape.goal_mb else "missed"
    cpu = statistics.median(r.cpu_seconds for r in measured)
    return [f"remora {form}", f"{seconds:.1f}", f"{cpu:.1f}", f"{peak:.0f}", f"{size:.0f}", met]


def _measure_edgellm(python: Path | None, checkpoint: Path, work: Path) -> list[str]:
    name = "tensorrt-edgellm-export 0.11"
    program = None if python is None else python.parent / "tensorrt-edgellm-export"
    if program is None or not program.exists():
        return [name, "not measured", "", "", "", ""]
    result = run([str(program), str(checkpoint), str(work / "edgellm")])
    seconds, cpu = f"{result.seconds:.1f}", f"{result.cpu_seconds:.1f}"
    return [name, seconds, cpu, f"{result.peak_mb:.0f}", "", ""]


def run(command: Sequence[str]) -> Run:
    """Time and peak RSS of a fresh child. Exits, showing its words, when the child fails."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as said:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said) as child:
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - began
        if child.returncode:
            said.seek(0)
            sys.exit(f"{command[0]} failed:\n{said.read().decode(errors='replace')[-2000:]}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6)


def make_checkpoint(directory: Path, shape: Shape) -> None:
    """Random weights, written tensor by tensor; a byte-level tokenizer of the full size."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(shape.config))
    (directory / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    _make_tokenizer(shape.config["vocab_size"]).save(str(directory / "tokenizer.json"))
    tensors = list(naming(read_config(directory)).tensors().items())
    if shape.shards == 1:
        _write_weights(directory / "model.safetensors", tensors)
        return
    weight_map = {}
    for number in range(shape.shards):
        name = f"model-{number + 1:05}-of-{shape.shards:05}.safetensors"
        own = tensors[number :: shape.shards]
        _write_weights(directory / name, own)
        weight_map |= dict.fromkeys((tensor for tensor, _ in own), name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_weights(path: Path, tensors: Sequence[tuple[str, tuple[int, ...]]]) -> None:
    header, end = {}, 0
    for name, shape in tensors:
        size = math.prod(shape) * 2
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    noise = np.random.default_rng(0).standard_normal(POOL, np.float32) * np.float32(0.02)
    pools = [noise.astype(ml_dtypes.bfloat16), (noise + 1).astype(ml_dtypes.bfloat16)]
    with path.open("wb") as f:
        f.write(len(encoded).to_bytes(8, "little") + encoded)
        for number, (name, shape) in enumerate(tensors):
            # No two tensors alike: a runtime that stores equal ones once would not be measured.
            pool, left = np.roll(pools["norm" in name], 4099 * number), math.prod(shape)
            while left:
                left -= f.write(pool[:left].tobytes()) // pool.itemsize


def _make_tokenizer(vocab: int) -> Tokenizer:
    """As many merges as the real one has, so that reading it costs what it costs there."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters]
    triples = [(a + b, c) for a, b in pairs for c in letters[64:67]]
    merges = (pairs + triples)[: vocab - len(letters)]
    tokens = [*letters, *(a + b for a, b in merges)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


if __name__ == "__main__":
    main()
