"""Decode and prefill of a Qwen2.5-0.5B-shaped int4 model: Remora's engine beside onnxruntime-genai
and llama.cpp.

    python benchmarks/decode.py [--work DIR] [--genai-python PYTHON] [--llama DIR] [--threads N]

All start from one random bf16 checkpoint, made here; the peers' own tools make their models of it:
onnxruntime-genai's builder, and for blocks of 32 llama.cpp's converter and llama-quantize (Q4_0 of
every matrix). --llama names a build of llama.cpp whose CMakeCache.txt names its source. Ratios of
medians of alternated blocks: absolute figures are this machine's. A peer that is not given is "not
measured".
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from alternate import Samples, Worker, alternate
from export import SHAPES, make_checkpoint
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
PAST = (128, 1024)
PROMPT = 512
PEERS = ("genai", "llama.cpp")
LLAMA_BLOCK = 32  # of Q4_0
GOAL_DECODE = {"genai": 1.3, "llama.cpp": 1.5}
GOAL_PREFILL = 4.0


def main() -> None:
    arguments = _arguments()
    if arguments.work is None:
        with tempfile.TemporaryDirectory(prefix="decode-bench-") as work:
            measure(arguments, Path(work))
    else:
        arguments.work.mkdir(parents=True, exist_ok=True)
        measure(arguments, arguments.work)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, help="keeps checkpoint and models (4 GB)")
    parser.add_argument("--genai-python", type=Path, help="Python with onnxruntime-genai 0.18")
    parser.add_argument("--llama", type=Path, help="build folder of llama.cpp, with llama-bench")
    parser.add_argument("--threads", type=int, default=2, help="of every program")
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each program")
    parser.add_argument("--blocks", type=int, nargs="+", default=[32, 128], choices=(32, 128))
    return parser.parse_args()


def measure(arguments: argparse.Namespace, work: Path) -> None:
    checkpoint = checkpoint_in(work)
    table = Table(title=f"tok/s, batch 1, {arguments.threads} threads")
    columns = ("measure", "int4 block", "remora", *PEERS, *(f"to {p}" for p in PEERS), "samples")
    for column in columns:
        table.add_column(column, justify="left" if column == "measure" else "right")
    for block in arguments.blocks:
        workers = {"remora": remora_worker(work, checkpoint, block, arguments.threads)}
        if arguments.genai_python is not None:
            workers["genai"] = _genai_worker(work, checkpoint, block, arguments)
        if arguments.llama is not None and block == LLAMA_BLOCK:
            workers["llama.cpp"] = _llama_worker(work, checkpoint, arguments)
        for name, worker in workers.items():
            Console().print(f"{name} block {block}: {worker.facts}")
        for past in PAST:
            request = {"what": "decode", "past": past, "steps": 8}
            samples = alternate(workers, request, arguments.rounds)
            _add(table, f"decode @{past}", block, _row(samples, 1))
        request = {"what": "prefill", "tokens": PROMPT, "repeats": 1}
        samples = alternate(workers, request, arguments.rounds)
        _add(table, f"prefill {PROMPT}", block, _row(samples, PROMPT))
        for worker in workers.values():
            worker.close()
        _add(
            table, f"prefill {PROMPT}, plain", block, _plain_row(work, checkpoint, block, arguments)
        )
    Console().print(table)
    goals = ", ".join(f"{goal} to {peer}" for peer, goal in GOAL_DECODE.items())
    Console().print(f"goals: decode >= {goals}; prefill >= {GOAL_PREFILL} to both")


def checkpoint_in(work: Path) -> Path:
    checkpoint = work / "checkpoint"
    if not checkpoint.exists():
        make_checkpoint(checkpoint, SHAPES["0.5b"])
        # What the peer's builder reads besides.
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "!"}
        (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
        config = {**SHAPES["0.5b"].config, "architectures": ["Qwen2ForCausalLM"]}
        (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint


def remora_worker(
    work: Path,
    checkpoint: Path,
    block: int,
    threads: int,
    adapters: int = 0,
    prefill: str = "auto",
) -> Worker:
    bundle = remora_bundle(work, checkpoint, block)
    script = str(HERE / "workers" / "remora_worker.py")
    arguments = [str(bundle), str(work / "engines"), str(threads), str(adapters), prefill]
    return Worker([sys.executable, script, *arguments])


def remora_bundle(work: Path, checkpoint: Path, block: int) -> Path:
    bundle = work / f"bundle-{block}"
    if not bundle.exists():
        program = str(Path(sys.executable).parent / "remora-build")
        flags = ["--int4-block", str(block), "--max-context", "2048", "--max-bank-rank", "256"]
        subprocess.run(
            [program, "export", str(checkpoint), str(bundle), *flags],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return bundle


def _genai_worker(
    work: Path, checkpoint: Path, block: int, arguments: argparse.Namespace
) -> Worker:
    model, python = work / f"genai-{block}", str(arguments.genai_python)
    if not model.exists():
        options = [f"block_size={block}", "accuracy_level=4"]
        builder = [python, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint)]
        unfinished = work / f"genai-{block}.unfinished"
        flags = ["-o", str(unfinished), "-p", "int4", "-e", "cpu", "--extra_options", *options]
        with (work / "genai-builder.log").open("wb") as log:
            subprocess.run([*builder, *flags], check=True, stdout=log, stderr=log)
        unfinished.rename(model)
    _set_threads(model / "genai_config.json", arguments.threads)
    return Worker([python, str(HERE / "workers" / "genai_worker.py"), str(model)])


def _llama_worker(work: Path, checkpoint: Path, arguments: argparse.Namespace) -> Worker:
    tools, model = arguments.llama / "bin", work / "llama-q4_0.gguf"
    if not model.exists():
        whole, unfinished = work / "llama-f16.gguf", work / "llama-q4_0.unfinished"
        converter = str(HERE / "workers" / "llama_convert.py")
        source = str(_llama_source(arguments.llama))
        convert = [sys.executable, converter, source, str(checkpoint), str(whole)]
        quantize = [str(tools / "llama-quantize"), "--pure", str(whole), str(unfinished), "Q4_0"]
        with (work / "llama.log").open("wb") as log:
            for command in (convert, quantize):
                subprocess.run(command, check=True, stdout=log, stderr=log)
        whole.unlink()
        unfinished.rename(model)
    script = str(HERE / "workers" / "llama_worker.py")
    program = str(tools / "llama-bench")
    return Worker([sys.executable, script, program, str(model), str(arguments.threads)])


def _llama_source(build: Path) -> Path:
    lines = (build / "CMakeCache.txt").read_text().splitlines()
    return Path(next(x.partition("=")[2] for x in lines if x.startswith("CMAKE_HOME_DIRECTORY")))


def _set_threads(path: Path, threads: int) -> None:
    """It runs on one thread unless told otherwise."""
    config: dict[str, Any] = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    path.write_text(json.dumps(config, indent=2))


def _add(table: Table, measure: str, block: int, row: list[str]) -> None:
    """Shown at once too: a run takes minutes."""
    Console().print(measure, block, *row)
    table.add_row(measure, str(block), *row)


def _plain_row(
    work: Path, checkpoint: Path, block: int, arguments: argparse.Namespace
) -> list[str]:
    """Our prompts as `prefill = auto` computes them against `plain`."""
    forms = {
        form: remora_worker(work, checkpoint, block, arguments.threads, prefill=form)
        for form in ("auto", "plain")
    }
    request = {"what": "prefill", "tokens": PROMPT, "repeats": 1}
    samples = alternate(forms, request, arguments.rounds)
    for worker in forms.values():
        worker.close()
    ours, plain = samples["auto"], samples["plain"]
    ratio = f"{plain.median_s / ours.median_s:.2f}"
    speed = f"{PROMPT / plain.median_s:.1f}"
    return [speed, "", "", f"auto {ratio}x", "", f"{ours.note}, {plain.note}"]


def _row(samples: dict[str, Samples], tokens: int) -> list[str]:
    ours = samples["remora"]
    speeds, ratios, notes = [f"{tokens / ours.median_s:.1f}"], [], [ours.note]
    for peer in PEERS:
        theirs = samples.get(peer)
        speeds.append("not measured" if theirs is None else f"{tokens / theirs.median_s:.1f}")
        ratios.append("" if theirs is None else f"{theirs.median_s / ours.median_s:.2f}")
        notes += [] if theirs is None else [theirs.note]
    return [*speeds, *ratios, ", ".join(notes)]


if __name__ == "__main__":
    main()
