"""What adapters cost: rank 16 on all projections of a Qwen2.5-0.5B-shaped int4 model.

    python benchmarks/adapters.py [--work DIR] [--threads N] [--rounds N] [--block 32|128]

Batch 1 with an adapter against without; with adapters resident but unused against none resident;
eight rows with eight adapters against eight rows with one; a swap of resident adapters.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from alternate import Worker, alternate
from decode import checkpoint_in, remora_worker
from rich.console import Console
from rich.table import Table

PAST = 128
ROWS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, help="keeps checkpoint and models (3 GB)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each form")
    parser.add_argument("--block", type=int, default=32, choices=(32, 128))
    arguments = parser.parse_args()
    if arguments.work is None:
        with tempfile.TemporaryDirectory(prefix="adapters-bench-") as work:
            measure(arguments, Path(work))
    else:
        arguments.work.mkdir(parents=True, exist_ok=True)
        measure(arguments, arguments.work)


def measure(arguments: argparse.Namespace, work: Path) -> None:
    checkpoint = checkpoint_in(work)
    bare = remora_worker(work, checkpoint, arguments.block, arguments.threads)
    full = remora_worker(work, checkpoint, arguments.block, arguments.threads, adapters=ROWS)
    table = Table(title=f"Adapters, rank 16 on all projections, int4 block {arguments.block}")
    for column in ("what", "ms", "against ms", "cost or ratio", "goal", "samples"):
        table.add_column(column, justify="left" if column == "what" else "right")
    step: dict[str, Any] = {"what": "decode", "past": PAST, "steps": 8}
    rounds = arguments.rounds
    _compare(table, "resident, none used", "<= 2 %", (full, step), (bare, step), rounds)
    one = {**step, "adapter": 0}
    _compare(table, "one adapter, batch 1", "<= 12 %", (full, one), (full, step), rounds)
    batch: dict[str, Any] = {"what": "batch", "past": PAST, "steps": 2}
    different = {**batch, "adapters": list(range(ROWS))}
    same = {**batch, "adapters": [0] * ROWS}
    base = {**batch, "adapters": [None] * ROWS}
    _compare(table, "8 rows: one adapter / none", "", (full, same), (full, base), rounds)
    _compare(table, "8 rows: 8 adapters / one", ">= 0.88", (full, different), (full, same), rounds)
    _compare(table, "8 rows / batch 1, per step", ">= 3.5x", (full, base), (full, step), rounds)
    request = {"what": "swap", "past": PAST, "steps": 8}
    swap = alternate({"swap": full}, request, rounds)["swap"]
    table.add_row(
        "swap of resident adapters", f"{swap.median_s * 1e3:.2f}", "", "", "<= 1 ms", swap.note
    )
    bare.close()
    full.close()
    Console().print(table)


class _Form:
    """A worker bound to one request, so that forms of one process can alternate."""

    def __init__(self, worker: Worker, request: dict[str, Any]) -> None:
        self._worker, self._request = worker, request
        self.busy_s = worker.busy_s

    def block(self, _: Any) -> list[float]:
        return self._worker.block(self._request)


def _compare(
    table: Table,
    what: str,
    goal: str,
    form: tuple[Worker, dict[str, Any]],
    against: tuple[Worker, dict[str, Any]],
    rounds: int,
) -> None:
    forms: dict[str, Any] = {"form": _Form(*form), "against": _Form(*against)}
    samples = alternate(forms, {}, rounds)
    a, b = samples["form"].median_s, samples["against"].median_s
    result = f"{100 * (a / b - 1):+.1f} % ({b / a:.2f}x)"
    notes = ", ".join(s.note for s in samples.values())
    table.add_row(what, f"{a * 1e3:.1f}", f"{b * 1e3:.1f}", result, goal, notes)


if __name__ == "__main__":
    main()
