"""Measures `remora-build export` on a random bf16 checkpoint in the shape of Qwen2.5-0.5B.

    python benchmarks/export.py [--work DIR] [--runs N] [--edgellm-python PYTHON]

Each run is a fresh process; CPU time and peak RSS are its own (os.wait4). The wall time means
something on an idle machine only.
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 896, 24, 14, 2, 64
INTERMEDIATE, VOCAB = 4864, 151936
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": INTERMEDIATE,
    "vocab_size": VOCAB,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
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
ROWS = 4096  # written at once: a child's peak RSS begins at its parent's
GOAL_SECONDS, GOAL_MB = 10.0, 600.0


@dataclass(frozen=True)
class Run:
    seconds: float
    cpu_seconds: float  # of all threads
    peak_mb: float  # 10^6 bytes


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="export-bench-") as work:
        checkpoint = Path(work) / "checkpoint"
        make_checkpoint(checkpoint)
        table = Table(title="Export of a Qwen2.5-0.5B-shaped bf16 checkpoint, golden included")
        for column in ("exporter", "seconds", "CPU seconds", "peak RSS MB", "bundle MB", "goal"):
            table.add_column(column, justify="left" if column == "exporter" else "right")
        for form, flags in FORMS.items():
            table.add_row(*_measure_remora(form, flags, checkpoint, Path(work), arguments.runs))
        table.add_row(*_measure_edgellm(arguments.edgellm_python, checkpoint, Path(work)))
        Console().print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, help="where 3 GB of files may go for a while")
    parser.add_argument("--runs", type=int, default=3, help="runs of each form; the median counts")
    parser.add_argument(
        "--edgellm-python", type=Path, help="Python with tensorrt-edgellm 0.11 installed"
    )
    return parser.parse_args()


def _measure_remora(
    form: str, flags: Sequence[str], checkpoint: Path, work: Path, runs: int
) -> list[str]:
    out = work / "bundle"
    program = str(Path(sys.executable).parent / "remora-build")
    command = [program, "export", str(checkpoint), str(out), "--force", "--json", *flags]
    measured = [run(command) for _ in range(runs)]
    seconds = statistics.median(r.seconds for r in measured)
    peak = max(r.peak_mb for r in measured)
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) / 1e6
    shutil.rmtree(out)
    met = "met" if seconds <= GOAL_SECONDS and peak <= GOAL_MB else "missed"
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


def make_checkpoint(directory: Path) -> None:
    """Random weights, written tensor by tensor; a byte-level tokenizer of the full size."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    _make_tokenizer().save(str(directory / "tokenizer.json"))
    _write_weights(directory / "model.safetensors")


def _tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (HIDDEN,)
        yield f"{at}.post_attention_layernorm.weight", (HIDDEN,)
        for part, n in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{at}.self_attn.{part}_proj.weight", (n, HIDDEN)
            yield f"{at}.self_attn.{part}_proj.bias", (n,)
        yield f"{at}.self_attn.o_proj.weight", (HIDDEN, queries)
        yield f"{at}.mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{at}.mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{at}.mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
    yield "model.norm.weight", (HIDDEN,)


def _write_weights(path: Path) -> None:
    header, end = {}, 0
    for name, shape in _tensors():
        size = math.prod(shape) * 2
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    random = np.random.default_rng(0)
    with path.open("wb") as f:
        f.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in _tensors():
            for first in range(0, shape[0], ROWS):
                rows = (min(ROWS, shape[0] - first), *shape[1:])
                f.write(_values(name, rows, random).tobytes())


def _values(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    noise = random.standard_normal(shape, np.float32) * np.float32(0.02)
    return (noise + 1 if "norm" in name else noise).astype(ml_dtypes.bfloat16)


def _make_tokenizer() -> Tokenizer:
    """As many merges as the real one has, so that reading it costs what it costs there."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters]
    triples = [(a + b, c) for a, b in pairs for c in letters[64:67]]
    merges = (pairs + triples)[: VOCAB - len(letters)]
    tokens = [*letters, *(a + b for a, b in merges)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


if __name__ == "__main__":
    main()
