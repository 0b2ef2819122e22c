"""Will an engine fit, part by part, and what to change when not. Pure; all sizes in bytes.

On unified memory (Jetson) what is free is shared with the rest of the system, so the floor is a
part of the plan; on a discrete GPU the backend says what is free and the floor is its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from remora_contract.errors import Refusal, RequestInvalid


@dataclass(frozen=True)
class MemoryPlan:
    """What is taken while an engine runs."""

    weights: int
    kv: int  # [layers, 2, rows, kv_heads, context, head_dim]
    bank: int  # adapters' columns and vectors
    workspace: int  # what layers take while they run: scratch and activations
    logits: int  # [rows, vocab] float32, and what sampling keeps of them
    floor: int  # stays free
    # Of a prompt's chunk beside decode steps: a second workspace, states, room to move a row.
    overlap: int = 0
    pinned: int = 0  # host memory that a GPU reads and writes, where it is the GPU's memory too
    step: int = 0  # a prompt's logits and states, and the rows' vectors of adapters

    def __post_init__(self) -> None:
        for part, size in vars(self).items():
            if size < 0:
                raise RequestInvalid(
                    f"a memory plan's {part} is {size} bytes; it cannot be less than 0"
                )

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def table(self) -> list[tuple[str, int]]:
        """Part and bytes, in the order of this class, for people."""
        return list(vars(self).items())


@dataclass(frozen=True)
class Shape:
    """What of an engine's size its user chose."""

    rows: int
    context: int
    bank_rank: int


def plan_refusals(plan: MemoryPlan, shape: Shape, free: int) -> list[Refusal]:
    """Empty when the plan fits into `free`; else one refusal with every part and what helps."""
    if plan.total <= free:
        return []
    parts = ", ".join(f"{part} {_mib(size)}" for part, size in plan.table() if size)
    need = f"{_mib(plan.total)} ({parts}); {_advice(plan, shape, plan.total - free)}"
    return [Refusal("memory", need, f"{_mib(free)} free")]


def _advice(plan: MemoryPlan, shape: Shape, excess: int) -> str:
    """The setting that alone is enough, or that nothing is."""
    found = []
    per_row = (plan.kv + plan.logits) // shape.rows
    if per_row and (rows := shape.rows - -(-excess // per_row)) >= 1:
        found.append(f"rows {rows} instead of {shape.rows}")
    per_token = plan.kv // shape.context
    if per_token and (context := shape.context - -(-excess // per_token)) >= 1:
        found.append(f"context {context} instead of {shape.context}")
    per_rank = plan.bank // shape.bank_rank if shape.bank_rank else 0
    if per_rank and (rank := shape.bank_rank - -(-excess // per_rank)) >= 0:
        found.append(f"a bank of rank {rank} instead of {shape.bank_rank}")
    if found:
        return f"{' or '.join(found)} would fit"
    return (
        "no smaller rows, context or bank alone is enough: lower several, or quantize the weights"
    )


def _mib(count: int) -> str:
    return f"{-(-count // (1 << 20))} MiB"
