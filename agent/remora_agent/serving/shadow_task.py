"""One comparison: what is asked of the two arms about an answer, what is heard, what it comes to.

    ANSWER: the candidate answers the prompt as the incumbent did
    CANDIDATE, INCUMBENT: each reads the incumbent's answer and says how likely each token was

Pure: knows names of adapters, no runtime and no counters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum

from remora_agent.bank.directory import Declared
from remora_agent.runtime.api import (
    AdapterRef,
    Finished,
    GenerationRequest,
    SamplingParams,
    Scoring,
    ServedArm,
    Share,
    StoppingParams,
    TokenLogprob,
)
from remora_agent.runtime.constraint import Grammar
from remora_agent.runtime.disagreement import forced, free
from remora_agent.serving.experiments import arm_selection, served_arm
from remora_contract.experiments import Shadow

# The adapters that a selection names now.
Resolve = Callable[..., tuple[AdapterRef, ...]]


class Stage(Enum):
    ANSWER = "answer"
    CANDIDATE = "candidate"
    INCUMBENT = "incumbent"


NEXT = {Stage.ANSWER: Stage.CANDIDATE, Stage.CANDIDATE: Stage.INCUMBENT, Stage.INCUMBENT: None}


@dataclass
class ShadowTask:
    """`request` is the incumbent's, with the seed it was answered with; `adapters` answered it, by
    revision; `answer` are its tokens."""

    declared: Declared
    shadow: Shadow
    request: GenerationRequest
    adapters: tuple[AdapterRef, ...]
    grammar: Grammar | None
    answer: tuple[int, ...]
    stage: Stage = Stage.ANSWER
    rival: list[int] = field(default_factory=list)  # the candidate's answer
    scores: dict[Stage, tuple[TokenLogprob, ...]] = field(default_factory=dict)

    @property
    def candidate(self) -> ServedArm:
        return self._arm(self.shadow.candidate)

    @property
    def asked_arm(self) -> ServedArm:
        """Who is asked in this stage."""
        return self.candidate if self.stage is not Stage.INCUMBENT else self.incumbent

    @property
    def incumbent(self) -> ServedArm:
        return self._arm(self.shadow.incumbent)

    def asking(
        self, request_id: str, resolve: Resolve, context: int
    ) -> tuple[GenerationRequest, Grammar | None]:
        """What to compute in this stage. Raises what `resolve` raises."""
        asked = replace(
            self.request,
            request_id=request_id,
            adapters=self._adapters(resolve),
            arm=self.asked_arm,
            deadline_s=None,
            scoring=Scoring(),
            share=Share(),
        )
        if self.stage is Stage.ANSWER:
            return asked, self.grammar
        return self._reading(asked, context), None

    def compared(self) -> dict[str, float]:
        """Once all stages have ended; names are SHADOW_COUNTS of the contract."""
        scores = self.scores[Stage.INCUMBENT], self.scores[Stage.CANDIDATE]
        return {**free(self.answer, self.rival), **forced(*scores)}

    def _adapters(self, resolve: Resolve) -> tuple[AdapterRef, ...]:
        if self.stage is Stage.INCUMBENT:
            return self.adapters
        return resolve(arm_selection(self.declared.experiment.arm(self.shadow.candidate)))

    def _reading(self, asked: GenerationRequest, context: int) -> GenerationRequest:
        """Prompt and answer, but for what would not leave the context a place."""
        prompt = asked.prompt
        return replace(
            asked,
            prompt=(prompt + self.answer)[: context - 1],
            sampling=SamplingParams(),
            stopping=StoppingParams(max_tokens=1, ignore_eos=True),
            constraint=None,
            scoring=Scoring(prompt_top=1, prompt_from=len(prompt)),
        )

    def _arm(self, name: str) -> ServedArm:
        return served_arm(self.declared, self.declared.experiment.arm(name))


def ran(arm: ServedArm, answered: Finished) -> bool:
    """Whether what answered is what the release says of the arm."""
    return arm.mix == tuple((a.digest, a.weight) for a in answered.provenance.adapters)


def refs(answered: Finished) -> tuple[AdapterRef, ...]:
    """Of what answered."""
    return tuple(AdapterRef(a.name, a.revision, a.weight) for a in answered.provenance.adapters)
