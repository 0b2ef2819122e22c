"""Who plays in the demo: a model, two adapters (one in two revisions), questions, and an oracle
that knows the right answers.

Owns the names and the comparison. Knows nothing of processes and rollouts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

from examples.demo.world import Variant, answer, questions
from remora_agent.client import Result

BASE = "base"


@dataclass(frozen=True)
class Check:
    """`complaint` is None for a right answer; `tokens` were compared."""

    complaint: str | None
    tokens: int


class Oracle(Protocol):
    def check(self, variant: str, question: str, result: Result) -> Check: ...


@dataclass(frozen=True)
class Cast:
    model: str  # the name the bundles are published under
    checkpoint: Path
    adapters: Path  # folder of PEFT directories: FIRST, SECOND-1, SECOND-2
    first: str
    second: str
    precision: str  # of the bundle that goes to all devices: int4 or fp16
    questions: tuple[str, ...]
    chat: bool  # through the chat template, or as plain text
    max_tokens: int
    oracle: Oracle

    def prompt(self, question: str) -> Any:
        return [{"role": "user", "content": question}] if self.chat else question

    def adapter_of(self, variant: str) -> str | None:
        """The name a request uses for the variant; which revision answers is the fleet's matter."""
        return None if variant == BASE else variant.partition("-")[0]

    def variants(self, revision: int) -> tuple[str, ...]:
        """Base, first, and the given revision of second."""
        return (BASE, self.first, f"{self.second}-{revision}")


class WorldOracle:
    """The demo's own world: one text is right."""

    def __init__(self) -> None:
        self._by_text = {question.text: question for question in questions()}

    def check(self, variant: str, question: str, result: Result) -> Check:
        right = answer(_variant(variant), self._by_text[question])
        tokens = len(result.token_ids)
        if result.text == right:
            return Check(None, tokens)
        return Check(f"{variant}: {question!r} got {result.text!r} instead of {right!r}", tokens)


def _variant(name: str) -> Variant:
    known: dict[str, Variant] = {v: v for v in ("base", "german", "json-1", "json-2")}
    return known[name]


@dataclass(frozen=True)
class ReferenceAnswer:
    """What transformers + peft answer in float32: tokens, winning logits, leads over the next."""

    ids: tuple[int, ...]
    logit: tuple[float, ...]
    margin: tuple[float, ...]

    def is_tie(self, i: int) -> bool:
        """A float16 engine may decide the other way: logits move by about a percent."""
        return self.margin[i] < 0.02 + 0.01 * abs(self.logit[i])


class ReferenceOracle:
    """Another checkpoint: token for token what the reference answers, up to its first near-tie."""

    def __init__(self, answers: dict[str, dict[str, ReferenceAnswer]]) -> None:
        self.answers = answers

    def check(self, variant: str, question: str, result: Result) -> Check:
        right = self.answers[variant][question]
        pairs = zip_longest(right.ids, result.token_ids)
        for i, (expected, got) in enumerate(pairs):
            if expected == got:
                continue
            if i < len(right.ids) and right.is_tie(i):
                return Check(None, i)
            complaint = f"{variant}: {question!r}: token {i} is {got}, the reference's {expected}"
            return Check(complaint, i)
        return Check(None, len(right.ids))


def world_cast(trained: Path) -> Cast:
    """What `python -m examples.demo.train` wrote into `trained`."""
    return Cast(
        model="world",
        checkpoint=trained / "checkpoint",
        adapters=trained / "adapters",
        first="german",
        second="json",
        precision="int4",
        questions=tuple(question.text for question in questions()),
        chat=True,
        max_tokens=64,
        oracle=WorldOracle(),
    )


def reference_cast(checkpoint: Path, reference: Path, name: str) -> Cast:
    """What `python -m examples.demo.reference` wrote into `reference` about the checkpoint."""
    document = json.loads((reference / "expected.json").read_text())
    answers = {
        variant: dict(zip(document["prompts"], map(_answer, found), strict=True))
        for variant, found in document["answers"].items()
    }
    return Cast(
        model=name,
        checkpoint=checkpoint,
        adapters=reference / "adapters",
        first="alpha",
        second="beta",
        precision="fp16",
        questions=tuple(document["prompts"]),
        chat=document["chat"],
        max_tokens=document["max_tokens"],
        oracle=ReferenceOracle(answers),
    )


def _answer(found: dict[str, Sequence[Any]]) -> ReferenceAnswer:
    return ReferenceAnswer(*(tuple(found[key]) for key in ("ids", "logit", "margin")))
