"""How two answers to one prompt differ, as numbers alone. Pure.

Free: both generate; compared are their tokens. Forced: both read the incumbent's answer; at each of
its tokens t the model's own choice and the logprob it gives t are compared.
"""

from __future__ import annotations

from collections.abc import Sequence

from remora_agent.runtime.api import TokenLogprob

MAX_NLL = 100.0  # of one token: -log of what a float32's softmax can still tell from nothing


def free(incumbent: Sequence[int], candidate: Sequence[int]) -> dict[str, float]:
    """Of the two answers' tokens; names are SHADOW_COUNTS of the contract."""
    common = 0
    for a, b in zip(incumbent, candidate, strict=False):
        if a != b:
            break
        common += 1
    return {
        "compared": 1,
        "exact": float(tuple(incumbent) == tuple(candidate)),
        "answer_tokens": len(incumbent),
        "prefix_tokens": common,
    }


def forced(
    incumbent: Sequence[TokenLogprob], candidate: Sequence[TokenLogprob]
) -> dict[str, float]:
    """Of the same tokens, each scored with the one likeliest token beside it."""
    pairs = list(zip(incumbent, candidate, strict=True))
    return {
        "scored_tokens": len(pairs),
        "agreed_tokens": sum(a.top[0][0] == b.top[0][0] for a, b in pairs),
        "incumbent_nll": sum(_nll(a) for a, _ in pairs),
        "candidate_nll": sum(_nll(b) for _, b in pairs),
    }


def _nll(scored: TokenLogprob) -> float:
    return min(MAX_NLL, -scored.logprob)
