"""What a release must show before it stays: checks over what devices measure, and golden questions
that a device answers before the release serves.

A check's text is a small language that only the controller reads (`remora_controller.gates`); here
it is text of bounded length. A golden question is asked by the device. Pure; owns no decision.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from remora_contract.artifact import check_name

MAX_CHECK = 512  # characters
MAX_CHECKS = 32
MAX_GOLDEN = 64
MAX_GOLDEN_TOKENS = 4096  # of one question and its answer, and of all scored texts together
MAX_GOLDEN_TEXT = 32 << 10
MAX_TOKEN_ID = 1 << 31
_PRINTABLE = re.compile(r"[\x20-\x7e]+")

OnFail = Literal["pause", "rollback"]
Scope = Literal["fleet", "device"]
GoldenKind = Literal["exact", "prefix", "logits", "perplexity"]


@dataclass(frozen=True)
class Gate:
    """`check` has to hold of the devices of a wave. Fewer than `min_devices` devices with
    `min_samples` samples of each metric are no evidence; where a wave is smaller, all of it is."""

    name: str
    check: str
    on_fail: OnFail = "rollback"
    min_devices: int = 1
    min_samples: int = 3
    scope: Scope = "fleet"  # device: each device by itself
    max_failing: float = 0.0  # share of devices that may fail a gate of scope `device`

    def __post_init__(self) -> None:
        check_name(self.name, "gate name")
        if len(self.check) > MAX_CHECK or not _PRINTABLE.fullmatch(self.check):
            raise ValueError(f"gate {self.name}: a check is 1 to {MAX_CHECK} ASCII characters")
        if not 1 <= self.min_devices <= 100_000 or not 1 <= self.min_samples <= 256:
            raise ValueError(
                f"gate {self.name}: min_devices is 1 to 100000, min_samples is 1 to 256"
            )
        if not 0 <= self.max_failing < 1:
            raise ValueError(f"gate {self.name}: max_failing is at least 0 and below 1")
        if self.max_failing and self.scope != "device":
            raise ValueError(f"gate {self.name}: max_failing goes with scope device")


@dataclass(frozen=True)
class GoldenQuestion:
    """Asked of the new release in a child process, before it serves.

    exact       greedy answer to the prompt is `expected_*` and then the model stops, or the answer
                is as long as `expected_*` where that says `tokens`
    prefix      greedy answer begins with `expected_*`
    logits      teacher-forced: at the last len(expected_tokens) positions of `tokens` the model
                answers `expected_tokens` with `logits`, none further off than `tolerance` spreads
    perplexity  of `text` (or `tokens`) per byte (token), at most `max_increase` (a fraction) above
                that of the release which serves now
    """

    name: str
    kind: GoldenKind
    text: str | None = None
    tokens: tuple[int, ...] = ()
    expected_text: str | None = None
    expected_tokens: tuple[int, ...] = ()
    logits: tuple[float, ...] = ()
    tolerance: float = 0.02  # spreads: standard deviations of the logits
    max_increase: float = 0.05
    use_case: str | None = None  # a use case or adapter of the release; None: the base model alone

    def __post_init__(self) -> None:
        check_name(self.name, "golden question name")
        problem = _problem(self)
        if problem is not None:
            raise ValueError(f"golden question {self.name}: {problem}")


@dataclass(frozen=True)
class GateSet:
    checks: tuple[Gate, ...] = ()
    golden: tuple[GoldenQuestion, ...] = ()

    def __post_init__(self) -> None:
        if len(self.checks) > MAX_CHECKS or len(self.golden) > MAX_GOLDEN:
            raise ValueError(f"at most {MAX_CHECKS} checks and {MAX_GOLDEN} golden questions")
        names = [*(g.name for g in self.checks), *(q.name for q in self.golden)]
        if len(set(names)) != len(names):
            raise ValueError("a gate name is listed twice")


def merged(base: tuple[Gate, ...], over: tuple[Gate, ...]) -> tuple[Gate, ...]:
    """`base` with those of `over`, which win by name. Raises ValueError when there are too many."""
    replaced = {g.name for g in over}
    gates = (*(g for g in base if g.name not in replaced), *over)
    return GateSet(checks=gates).checks


def _problem(question: GoldenQuestion) -> str | None:
    if (question.text is None) == (not question.tokens):
        return "give either text or tokens to ask"
    texts = [t for t in (question.text, question.expected_text) if t is not None]
    if any(not t or len(t) > MAX_GOLDEN_TEXT for t in texts):
        return f"a text has 1 to {MAX_GOLDEN_TEXT} characters"
    ids = (*question.tokens, *question.expected_tokens)
    if len(ids) > MAX_GOLDEN_TOKENS or any(not 0 <= t < MAX_TOKEN_ID for t in ids):
        return f"at most {MAX_GOLDEN_TOKENS} token ids, none negative"
    return _KIND_PROBLEMS[question.kind](question)


def _answer_problem(question: GoldenQuestion) -> str | None:
    if question.logits:
        return "logits go with kind logits"
    if (question.expected_text is None) == (not question.expected_tokens):
        return "give either expected_text or expected_tokens"
    return None


def _logits_problem(question: GoldenQuestion) -> str | None:
    if not question.tokens or question.expected_text is not None:
        return "kind logits takes tokens and expected_tokens, no texts"
    if not 1 <= len(question.expected_tokens) == len(question.logits) <= len(question.tokens):
        return "kind logits needs as many logits as expected_tokens, at most as many as tokens"
    return None if 0 < question.tolerance <= 10 else "tolerance is above 0 and at most 10 spreads"


def _perplexity_problem(question: GoldenQuestion) -> str | None:
    if question.expected_text is not None or question.expected_tokens or question.logits:
        return "kind perplexity scores what it asks: leave expected answers out"
    if question.tokens and len(question.tokens) < 2:
        return "kind perplexity needs at least two tokens"
    return None if 0 <= question.max_increase <= 10 else "max_increase is between 0 and 10"


_KIND_PROBLEMS = {
    "exact": _answer_problem,
    "prefix": _answer_problem,
    "logits": _logits_problem,
    "perplexity": _perplexity_problem,
}
