"""What counts of arms come to: means, shares, differences; None where nothing was counted. Pure."""

from __future__ import annotations

from collections.abc import Mapping

Numbers = dict[str, float | None]


def arm_statistics(counts: Mapping[str, float]) -> Numbers:
    """Seconds are sums over answers that went to their end, so means are over those."""
    requests, answered = counts.get("requests", 0.0), answers(counts)
    return {
        "failure_fraction": _ratio(counts.get("failures", 0.0), requests),
        "mean_first_token_s": _ratio(counts.get("first_token_seconds", 0.0), answered),
        "mean_answer_s": _ratio(counts.get("answer_seconds", 0.0), answered),
    }


def answers(counts: Mapping[str, float]) -> float:
    """How many went to their end."""
    ended = counts.get("failures", 0.0) + counts.get("cancelled", 0.0)
    return max(0.0, counts.get("requests", 0.0) - ended)


def shadow_statistics(counts: Mapping[str, float]) -> Numbers:
    """exact: share of compared answers with the same tokens; prefix: of the incumbent's tokens that
    the candidate's answer begins with; agreement: of scored tokens where both find the same one
    likeliest; nll_delta: nats by which the candidate finds a token less likely, on average."""
    scored = counts.get("scored_tokens", 0.0)
    delta = counts.get("candidate_nll", 0.0) - counts.get("incumbent_nll", 0.0)
    return {
        "exact": _ratio(counts.get("exact", 0.0), counts.get("compared", 0.0)),
        "prefix": _ratio(counts.get("prefix_tokens", 0.0), counts.get("answer_tokens", 0.0)),
        "agreement": _ratio(counts.get("agreed_tokens", 0.0), scored),
        "nll_delta": _ratio(delta, scored),
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
