"""golden.json: prompts with the tokens the graph must answer, recorded on the build host from the
exported weights. A device's engine is proven against it before it serves.

Recording is teacher-forced: one pass over `tokens`, so a near-tie cannot cascade. At every checked
position p the graph, having read tokens[0..p], answers `expected[i]` with logit `logit[i]`, ahead
of the runner-up by `margin[i]`; checks are the last len(expected) positions.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GoldenPrompt:
    tokens: tuple[int, ...]
    expected: tuple[int, ...]  # arg-max of the logits at the last positions of `tokens`
    logit: tuple[float, ...]  # the winning logit there
    margin: tuple[float, ...]  # winner minus runner-up
    text: str | None = None


@dataclass(frozen=True)
class Golden:
    format_version: int
    prompts: tuple[GoldenPrompt, ...]

    def __post_init__(self) -> None:
        for i, p in enumerate(self.prompts):
            if not len(p.expected) == len(p.logit) == len(p.margin) <= len(p.tokens):
                raise ValueError(f"prompt {i}: lists of different lengths")
