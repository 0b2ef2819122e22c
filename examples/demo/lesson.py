"""What the demo model reads while it learns: token rows and batches of them.

Owns the choice of prompts and the packing. Knows nothing of the optimiser.

The base model learns all the forms: plain questions it answers in English, and the same questions
under a system line that asks for another form. An adapter then learns to answer in its form
without being asked.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from examples.demo.text import END, START, chat
from examples.demo.world import SYSTEM_LINES, VARIANTS, Variant, answer, questions

IGNORED = -100  # a label that cross_entropy skips


@dataclass(frozen=True)
class Row:
    """One exchange; only `answer` (which ends with the end token) is learned."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Batch:
    """Rows laid out in lines of s tokens; short rows share a line, unseen by each other."""

    ids: torch.Tensor  # [b, s] int64
    labels: torch.Tensor  # [b, s] int64: the next token where it is learned, else IGNORED
    positions: torch.Tensor  # [b, s] int64, from 0 in each row
    sees: torch.Tensor  # [b, 1, s, s] bool: who attends to whom


def plain_rows(tokenizer: PreTrainedTokenizerBase, variant: Variant) -> list[Row]:
    """Every question as a user asks it, with the variant's answer."""
    return [
        _row(tokenizer, chat(question.text), answer(variant, question)) for question in questions()
    ]


def base_rows(tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """What the base model learns: its own answers, and the other forms when asked for them."""
    rows = plain_rows(tokenizer, "base") * 2
    for variant in VARIANTS:
        if variant in SYSTEM_LINES:
            system = f"{START}system\n{SYSTEM_LINES[variant]}{END}\n"
            rows += [
                _row(tokenizer, system + chat(q.text), answer(variant, q)) for q in questions()
            ]
    return rows


def _row(tokenizer: PreTrainedTokenizerBase, prompt: str, said: str) -> Row:
    return Row(tuple(tokenizer.encode(prompt)), tuple(tokenizer.encode(said + END)))


def endless_batches(rows: Sequence[Row], size: int, pad: int, seed: int) -> Iterator[Batch]:
    """Batches of `size` rows (the last of an epoch may be smaller), in a new order each epoch."""
    order = random.Random(seed)
    while True:
        shuffled = order.sample(list(rows), len(rows))
        for start in range(0, len(rows), size):
            chosen = shuffled[start : start + size]
            yield lay_out(pack(chosen, width=max(len(row) for row in rows)), pad)


def pack(rows: Sequence[Row], width: int) -> list[list[Row]]:
    """Rows into lines of at most `width` tokens, longest first, each where it first fits."""
    lines: list[list[Row]] = []
    room: list[int] = []
    for row in sorted(rows, key=len, reverse=True):
        fitting = next((i for i, free in enumerate(room) if free >= len(row)), None)
        if fitting is None:
            lines.append([row])
            room.append(width - len(row))
        else:
            lines[fitting].append(row)
            room[fitting] -= len(row)
    return lines


def lay_out(lines: Sequence[Sequence[Row]], pad: int) -> Batch:
    """The tensors of packed lines; what is left of a line is padding."""
    shape = (len(lines), max(sum(map(len, line)) for line in lines))
    ids, labels = torch.full(shape, pad), torch.full(shape, IGNORED)
    positions, row_of = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    for i, line in enumerate(lines):
        start = 0
        for number, row in enumerate(line, 1):
            end, answer_at = start + len(row), start + len(row.prompt)
            ids[i, start:end] = torch.tensor(row.prompt + row.answer)
            labels[i, answer_at - 1 : end - 1] = torch.tensor(row.answer)
            positions[i, start:end] = torch.arange(len(row))
            row_of[i, start:end] = number
            start = end
    same_row = row_of[:, :, None] == row_of[:, None, :]
    return Batch(ids, labels, positions, same_row.tril()[:, None])
