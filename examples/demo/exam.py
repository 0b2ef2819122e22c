"""Proves what the demo model learned: every answer token ahead of every other, with room to spare.

Owns the measure (the margin in logits) and the simulation of a device's int4 arithmetic. A margin
of the whole answer under teacher forcing is the same as greedy decoding getting it right.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from examples.demo.lesson import IGNORED, Batch, Row, lay_out

BLOCK = 32  # weights sharing one scale; activations are quantized in the same blocks


@dataclass(frozen=True)
class Marks:
    """`right` of `asked` answers correct to the token; `margin`: the narrowest win, in logits."""

    asked: int
    right: int
    margin: float


def read(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits [b, s, vocab]."""
    return model(
        input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.sees
    ).logits


def examine(model: nn.Module, rows: Sequence[Row], pad: int) -> Marks:
    batch = lay_out([[row] for row in rows], pad)
    learned = batch.labels != IGNORED
    with torch.no_grad():
        logits = read(model, batch)
    labels = batch.labels.clamp_min(0).unsqueeze(-1)
    expected = logits.gather(-1, labels).squeeze(-1)
    rival = logits.scatter(-1, labels, -torch.inf).max(-1).values
    margin = (expected - rival).masked_fill(~learned, torch.inf)
    right = int((margin > 0).all(dim=1).sum())
    return Marks(len(rows), right, float(margin.min()))


def as_int4(model: nn.Module) -> nn.Module:
    """A copy that computes as an int4 engine does: 4-bit weights, embedding and head, 8-bit inputs.

    Adapter matrices (PEFT's lora_A, lora_B) stay as they are; so do the norms.
    """
    quantized = copy.deepcopy(model)
    for name, module in quantized.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) and "lora_" not in name:
            module.weight.data = round_blocks(module.weight.data, levels=7)
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(_round_input)
    return quantized


def round_blocks(x: torch.Tensor, levels: int) -> torch.Tensor:
    """Symmetric rounding to integers of ±levels times a scale for each BLOCK of the last axis."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-12) / levels
    return ((blocks / scale).round() * scale).flatten(-2)


def _round_input(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (round_blocks(inputs[0], levels=127), *inputs[1:])
