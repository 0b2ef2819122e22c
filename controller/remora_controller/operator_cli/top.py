"""`remora top`: the fleet's telemetry, live."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from remora_controller.operator_cli import render
from remora_controller.operator_cli.devices import Selector
from remora_controller.operator_cli.session import Session, connect
from remora_protos.operator.v1 import operator_pb2 as pb


@dataclass(frozen=True)
class Column:
    """A heading, what fills it, and how it looks. `read` gives None when a device sends none."""

    heading: str
    read: Callable[[Mapping[str, float]], float | None]
    show: Callable[[float], str]


def highest(name: str) -> Callable[[Mapping[str, float]], float | None]:
    """The metric `name`, or the highest of `name.label` (sensors, several GPUs)."""

    def read(metrics: Mapping[str, float]) -> float | None:
        found = [v for n, v in metrics.items() if n == name or n.startswith(f"{name}.")]
        return max(found, default=None)

    return read


def memory_share(metrics: Mapping[str, float]) -> float | None:
    total = metrics.get("memory_total_bytes", 0.0)
    used = metrics.get("memory_used_bytes")
    return used / total if used is not None and total > 0 else None


def _percent(value: float) -> str:
    return f"{value:.0%}"


COLUMNS = (
    Column(">TOK/S", highest("tokens_per_s"), lambda v: f"{v:.1f}"),
    Column(">TTFT", highest("ttft_s"), lambda v: f"{v * 1000:.0f} ms"),
    Column(">QUEUE", highest("queue_depth"), lambda v: f"{v:.0f}"),
    Column(">MEM", memory_share, _percent),
    Column(">CPU", highest("cpu_load"), _percent),
    Column(">GPU", highest("gpu_load"), _percent),
    Column(">TEMP", highest("temperature_celsius"), lambda v: f"{v:.0f} °C"),
    Column(">POWER", highest("power_watts"), lambda v: f"{v:.1f} W"),
    Column(">J/TOK", highest("joules_per_token"), lambda v: f"{v:.2f}"),
)


def register(root: typer.Typer) -> None:
    root.command()(top)


def top(
    context: typer.Context,
    selector: Selector = "",
    once: Annotated[bool, typer.Option("--once", help="Print once and end.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between redraws.")] = 2.0,
    as_json: render.Json = None,
) -> None:
    """Show devices with their newest telemetry, live. A pipe or --json gets it once."""
    session = connect(context)
    console = render.console()
    if as_json is not None:
        render.print_data(render.plain(_rows(session, selector)), as_json)
    elif once or not console.is_terminal:
        console.print(fleet_table(_rows(session, selector), time.time()))
    else:
        with Live(console=console, auto_refresh=False, screen=True) as live:
            while True:
                table = fleet_table(_rows(session, selector), time.time())
                live.update(table, refresh=True)
                time.sleep(interval)


def _rows(session: Session, selector: str) -> list[pb.TopRow]:
    return list(session.call(session.stub.Top, pb.TopRequest(selector=selector)).rows)


def fleet_table(rows: list[pb.TopRow], now: float) -> Table:
    headings = ("DEVICE", "STATUS", "RUNNING", "PHASE", *(c.heading for c in COLUMNS), "AS OF")
    lines: list[Sequence[str | Text]] = [
        (
            row.device.device_id,
            render.styled(row.device.status),
            row.device.running_release_id or "-",
            row.device.phase or "-",
            *(_cell(row.metrics, column) for column in COLUMNS),
            render.ago(row.metrics_at_unix_s, now),
        )
        for row in rows
    ]
    return render.table(headings, lines)


def _cell(metrics: Mapping[str, float], column: Column) -> str:
    found = column.read(metrics)
    return "-" if found is None else column.show(found)
