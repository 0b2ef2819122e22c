"""Makes the demo's checkpoint and adapters, really trained: `python -m examples.demo.train OUT`.

    OUT/checkpoint/               a Qwen3 checkpoint as Hugging Face writes it (bfloat16)
    OUT/adapters/german/          a PEFT LoRA: rank 8 on all seven projections
    OUT/adapters/json-1/, json-2/ two revisions of another: rank 4, rsLoRA, on four projections
    OUT/report.json               accuracy, margins, seconds

Owns the recipe. Exits 1 unless every variant answers every question exactly, also in int4.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging as transformers_logging

from examples.demo.exam import Marks, as_int4, examine, read
from examples.demo.lesson import IGNORED, Batch, Row, base_rows, endless_batches, plain_rows
from examples.demo.text import VOCAB, make_tokenizer
from examples.demo.world import Variant

SEED = 7
# Logits between the right token and the next one. float16 moves them by a hundredth, int4 by some
# tenths (and its margin is examined on its own).
MIN_MARGIN = 1.0


@dataclass(frozen=True)
class Course:
    steps: int  # of one round
    rounds: int  # until everything is right, at most
    learning_rate: float
    batch: int


BASE_COURSE = Course(steps=150, rounds=3, learning_rate=3e-3, batch=64)
ADAPTER_COURSE = Course(steps=60, rounds=4, learning_rate=5e-3, batch=30)
# Each adapter's revisions, in order.
ADAPTERS: tuple[tuple[Variant, ...], ...] = (("german",), ("json-1", "json-2"))
LORA: dict[Variant, LoraConfig] = {
    "german": LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    "json-1": LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "o_proj", "down_proj"],
    ),
}


def make_model(tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """A small Qwen3, random. Head size 64, which every engine has a kernel for."""
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def learn(model: nn.Module, batches: Iterator[Batch], course: Course) -> None:
    """One round: AdamW with a one-cycle schedule."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=course.learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, course.learning_rate, total_steps=course.steps, pct_start=0.15
    )
    for _ in range(course.steps):
        loss = _loss(model, next(batches))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()


def _loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    logits = read(model, batch)
    learned = batch.labels != IGNORED
    return functional.cross_entropy(logits[learned], batch.labels[learned])


@dataclass(frozen=True)
class Graded:
    """A variant's marks in full precision and as an int4 engine computes."""

    full: Marks
    int4: Marks

    @property
    def passed(self) -> bool:
        return all(m.right == m.asked and m.margin >= MIN_MARGIN for m in (self.full, self.int4))


def grade(model: nn.Module, rows: list[Row], pad: int) -> Graded:
    return Graded(examine(model, rows, pad), examine(as_int4(model), rows, pad))


def train_until_right(
    model: nn.Module, lesson: list[Row], exam: list[Row], course: Course, pad: int
) -> Graded:
    """Rounds of the course until the exam is passed; the last grade, passed or not."""
    batches = endless_batches(lesson, course.batch, pad, SEED)
    graded = None
    for _ in range(course.rounds):
        learn(model, batches, course)
        graded = grade(model, exam, pad)
        if graded.passed:
            break
    assert graded is not None
    return graded


def train_base(out: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Qwen3ForCausalLM, Graded]:
    """Writes OUT/checkpoint; returns the model as it was saved, rounded to bfloat16."""
    model, pad = make_model(tokenizer), int(tokenizer.pad_token_id)
    exam = plain_rows(tokenizer, "base")
    train_until_right(model, base_rows(tokenizer), exam, BASE_COURSE, pad)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = model.to(torch.bfloat16)
    model.save_pretrained(out / "checkpoint")
    tokenizer.save_pretrained(out / "checkpoint")
    model = model.to(torch.float32)
    return model, grade(model, exam, pad)


def train_adapter(
    model: PeftModel, variant: Variant, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> Graded:
    """Trains the model's active adapter and saves it."""
    rows = plain_rows(tokenizer, variant)
    graded = train_until_right(model, rows, rows, ADAPTER_COURSE, int(tokenizer.pad_token_id))
    model.save_pretrained(directory)
    return graded


@dataclass(frozen=True)
class Lesson:
    """What was learned and what it cost."""

    variant: Variant
    grade: Graded
    wall_s: float
    cpu_s: float


def train_all(out: Path) -> Iterator[Lesson]:
    """Writes everything below OUT, reporting after each variant. Seeded: a second call on the same
    machine gives the same weights."""
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    clock = _Stopwatch()
    model, graded = train_base(out, tokenizer)
    yield clock.lesson("base", graded)
    for revisions in ADAPTERS:
        adapted = get_peft_model(model, LORA[revisions[0]])
        for variant in revisions:  # a later revision learns on from the one before
            graded = train_adapter(adapted, variant, tokenizer, out / "adapters" / variant)
            yield clock.lesson(variant, graded)
        model = adapted.unload()


class _Stopwatch:
    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def lesson(self, variant: Variant, graded: Graded) -> Lesson:
        """Times since the last call."""
        wall, cpu = time.monotonic(), time.process_time()
        lesson = Lesson(variant, graded, wall - self._wall, cpu - self._cpu)
        self._wall, self._cpu = wall, cpu
        return lesson


def describe(lesson: Lesson) -> str:
    full, int4 = lesson.grade.full, lesson.grade.int4
    return (
        f"{lesson.variant:7} {full.right}/{full.asked} right, margin {full.margin:.1f} · "
        f"in int4 {int4.right}/{int4.asked}, {int4.margin:.1f} · "
        f"{lesson.wall_s:.1f} s ({lesson.cpu_s:.1f} s of CPU)"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.demo.train", description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write, made when missing")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()
    # peft asks transformers for an attribute under its old name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    lessons = []
    for lesson in train_all(options.out):
        print(describe(lesson), flush=True)
        lessons.append(lesson)
    report = [dataclasses.asdict(lesson) for lesson in lessons]
    (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    failed = [lesson.variant for lesson in lessons if not lesson.grade.passed]
    if failed:
        print(f"error: not learned well enough: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
