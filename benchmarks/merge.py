"""Measures `remora-build merge` beside PEFT's own merge_and_unload and save_pretrained: a rank-16
all-linear adapter into a random bf16 checkpoint in the shape of Qwen2.5-0.5B.

    python benchmarks/merge.py [--work DIR] [--runs N] [--edgellm-python PYTHON]

Runs alternate; each is a fresh process, CPU time and peak RSS are its own (os.wait4). The wall time
means something on an idle machine only. With --edgellm-python, TensorRT Edge-LLM's merge of that
environment runs too.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from export import SHAPES, Run, make_checkpoint, run
from peft_adapter import make_adapter
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

SHAPE = SHAPES["0.5b"]
PEFT_CODE = """
import sys, torch, peft, transformers
checkpoint, adapter, out = sys.argv[1:]
base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(out)
"""
GOAL_SECONDS, GOAL_MB = 6.0, 800.0


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="merge-bench-") as work:
        checkpoint, adapter = Path(work) / "checkpoint", Path(work) / "adapter"
        make_checkpoint(checkpoint, SHAPE)
        make_adapter(adapter, SHAPE)
        commands = _commands(checkpoint, adapter, Path(work), arguments.edgellm_python)
        measured: dict[str, list[Run]] = {name: [] for name in commands}
        for _ in range(arguments.runs):
            for name, command in commands.items():
                shutil.rmtree(Path(work) / name, ignore_errors=True)
                measured[name].append(run(command))
        Console().print(_table(measured))
        Console().print(_difference(Path(work) / "remora", Path(work) / "peft"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, help="where 4 GB of files may go for a while")
    parser.add_argument("--runs", type=int, default=3, help="runs of each; the median counts")
    parser.add_argument(
        "--edgellm-python", type=Path, help="Python with tensorrt-edgellm 0.11 installed"
    )
    return parser.parse_args()


def _commands(
    checkpoint: Path, adapter: Path, work: Path, edgellm_python: Path | None
) -> dict[str, list[str]]:
    remora = str(Path(sys.executable).parent / "remora-build")
    commands = {
        "remora": [remora, "merge", str(checkpoint), str(adapter), str(work / "remora"), "--json"],
        "peft": [
            sys.executable,
            "-c",
            PEFT_CODE,
            str(checkpoint),
            str(adapter),
            str(work / "peft"),
        ],
    }
    if edgellm_python is not None:
        program = str(edgellm_python.parent / "tensorrt-edgellm-merge-lora")
        places = ["--model_dir", str(checkpoint), "--lora_dir", str(adapter), "--device", "cpu"]
        commands["edgellm"] = [program, *places, "--output_dir", str(work / "edgellm")]
    return commands


def _table(measured: Mapping[str, Sequence[Run]]) -> Table:
    table = Table(title="Merge of a rank-16 all-linear adapter, Qwen2.5-0.5B-shaped, bf16")
    for column in ("merger", "seconds", "CPU seconds", "peak RSS MB", "times remora", "goal"):
        table.add_column(column, justify="left" if column == "merger" else "right")
    ours = statistics.median(r.seconds for r in measured["remora"])
    for name, runs in measured.items():
        seconds = statistics.median(r.seconds for r in runs)
        cpu = statistics.median(r.cpu_seconds for r in runs)
        peak = max(r.peak_mb for r in runs)
        met = "met" if seconds <= GOAL_SECONDS and peak <= GOAL_MB else "missed"
        ratio = f"{seconds / ours:.1f}"
        goal = met if name == "remora" else ""
        table.add_row(name, f"{seconds:.1f}", f"{cpu:.1f}", f"{peak:.0f}", ratio, goal)
    return table


def _difference(ours: Path, theirs: Path) -> str:
    """How far the two results are apart, in units of the last place of bfloat16."""
    got, want = (load_file(p / "model.safetensors") for p in (ours, theirs))
    worst, different, count = 0, 0, 0
    for name, values in want.items():
        steps = np.abs(_ordered(got[name]) - _ordered(values))
        worst, different = max(worst, int(steps.max())), different + int((steps > 0).sum())
        count += steps.size
    return f"of {count} weights {different} differ, by at most {worst} unit(s) in the last place"


def _ordered(values: np.ndarray) -> np.ndarray:
    """bfloat16 as integers of which neighbours differ by 1."""
    bits = values.astype(ml_dtypes.bfloat16).view(np.int16).astype(np.int32)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)


if __name__ == "__main__":
    main()
