"""Measures `remora-build adapter` on a rank-16 all-linear adapter for a Qwen2.5-0.5B-shaped model.

    python benchmarks/convert.py [--work DIR] [--rounds N] [--edgellm-python PYTHON]

The wall time of the whole command, imports included, as a person waits for it. Each round runs each
program once, in turn, after other programs have paused; a run during which they took a quarter of
a core or more counts only when no quiet one was had. On a busy machine the processor's seconds say
more than the clock's; Python with numpy alone is the measure beside them. With --edgellm-python,
NVIDIA's tensorrt-edgellm-process-lora of that environment takes its turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from alternate import QUIET_CORES, busy_s, wait_for_quiet
from export import SHAPES, Run, run
from peft_adapter import RANK, decoder_of, make_adapter
from rich.console import Console
from rich.table import Table

from remora_contract.bundle import (
    BUNDLE_JSON,
    FORMAT_VERSION,
    GRAPH_FILE,
    Bundle,
    BundleFile,
    GraphSpec,
    SourceInfo,
)
from remora_contract.digests import canonical_json, digest_bytes

SHAPE = SHAPES["0.5b"]
GOAL_SECONDS = 0.5
PEER = "tensorrt-edgellm-process-lora 0.11"
BARE = "python -c 'import numpy'"
PEER_SECONDS = 3.2  # as published in PERFORMANCE.md


@dataclass
class Runs:
    """Of one program; quiet ones apart."""

    quiet: list[Run] = field(default_factory=list)
    disturbed: list[Run] = field(default_factory=list)

    @property
    def counted(self) -> list[Run]:
        return self.quiet or self.disturbed

    @property
    def seconds(self) -> float:
        return statistics.median(r.seconds for r in self.counted)

    @property
    def cpu_seconds(self) -> float:
        return statistics.median(r.cpu_seconds for r in self.counted)


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="convert-bench-") as work:
        adapter, base = Path(work) / "peft", Path(work) / "base"
        make_adapter(adapter, SHAPE)
        make_base(base)
        programs = _programs(adapter, base, Path(work), arguments.edgellm_python)
        measured = measure(programs, arguments.rounds)
    Console().print(_table(measured))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, help="where 200 MB of files may go for a while")
    parser.add_argument("--rounds", type=int, default=9, help="runs of each; the median counts")
    parser.add_argument(
        "--edgellm-python", type=Path, help="Python with tensorrt-edgellm 0.11 installed"
    )
    return parser.parse_args()


def _programs(
    adapter: Path, base: Path, work: Path, edgellm_python: Path | None
) -> dict[str, list[str]]:
    """Title -> command."""
    remora = str(Path(sys.executable).parent / "remora-build")

    def convert(source: Path, out: str, *more: str) -> list[str]:
        return [remora, "adapter", str(source), str(work / out), f"--base={base}", "--force", *more]

    programs = {
        BARE: [sys.executable, "-c", "import numpy"],
        "remora: PEFT to Remora": convert(adapter, "remora"),
        "remora: PEFT to Edge-LLM": convert(adapter, "edgellm", "--format=edgellm"),
        "remora: PEFT to TensorRT-LLM": convert(adapter, "trtllm", "--format=trtllm"),
        "remora: Edge-LLM to Remora": convert(work / "edgellm", "from-edgellm"),
        "remora: TensorRT-LLM to Remora": convert(work / "trtllm", "from-trtllm"),
    }
    if edgellm_python is not None:
        tool = str(edgellm_python.parent / "tensorrt-edgellm-process-lora")
        programs[PEER] = [tool, f"--input_dir={adapter}", f"--output_dir={work / 'peer'}"]
    return programs


def measure(programs: Mapping[str, Sequence[str]], rounds: int) -> dict[str, Runs]:
    """`rounds` runs of each in turn; one more of each comes first and does not count."""
    runs = {title: Runs() for title in programs}
    for number in range(rounds + 1):
        for title, command in programs.items():
            wait_for_quiet()
            began, busy = time.perf_counter(), busy_s()
            result = run(command)
            wall = time.perf_counter() - began
            others = (busy_s() - busy - result.cpu_seconds) / wall
            if number:
                kept = runs[title].quiet if others < QUIET_CORES else runs[title].disturbed
                kept.append(result)
    return runs


def _table(measured: Mapping[str, Runs]) -> Table:
    table = Table(title=f"Conversion of a rank-{RANK} all-linear adapter, Qwen2.5-0.5B-shaped")
    columns = (
        "program",
        "seconds",
        "fastest",
        "CPU seconds",
        "of bare",
        "peak RSS MB",
        "runs",
        "goal",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "program" else "right")
    for title, runs in measured.items():
        table.add_row(*_row(title, runs, measured[BARE]))
    if PEER not in measured:
        table.add_row(PEER, "not measured", "", "", "", "", "", f"(published: {PEER_SECONDS})")
    return table


def _row(title: str, runs: Runs, bare: Runs) -> Iterator[str]:
    counted = runs.counted
    yield title
    yield f"{runs.seconds:.2f}"
    yield f"{min(r.seconds for r in counted):.2f}"
    yield f"{runs.cpu_seconds:.2f}"
    yield f"{runs.cpu_seconds / bare.cpu_seconds:.1f}"
    yield f"{max(r.peak_mb for r in counted):.0f}"
    yield f"{len(runs.quiet)} quiet" if runs.quiet else f"{len(runs.disturbed)} DISTURBED"
    yield "" if title in (PEER, BARE) else "met" if runs.seconds <= GOAL_SECONDS else "missed"


def make_base(directory: Path) -> None:
    """A bundle's document: all that a conversion reads of it."""
    directory.mkdir(parents=True)
    bundle = Bundle(
        format_version=FORMAT_VERSION,
        base_digest=digest_bytes(b"benchmark"),
        decoder=decoder_of(SHAPE),
        graph=GraphSpec("native", "float16", 4096, 64, 24),
        files=(BundleFile(GRAPH_FILE, 0, digest_bytes(b"")),),
        eos_token_ids=(151645,),
        bos_token_id=None,
        pad_token_id=None,
        source=SourceInfo("benchmark", "qwen2", "bfloat16"),
        exporter="benchmark",
    )
    (directory / BUNDLE_JSON).write_bytes(canonical_json(bundle))


if __name__ == "__main__":
    main()
