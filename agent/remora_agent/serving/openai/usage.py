"""Usage and the fingerprint of what answered, over all answers of a request. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from remora_agent.runtime.api import Finished, FinishReason, Provenance
from remora_contract.errors import Unavailable


def usage(ended: Sequence[Finished], n: int) -> dict[str, Any]:
    """`ended` in the order of the choices, n for each prompt: its tokens count once."""
    prompts = [e.usage.prompt_tokens for e in ended[::n]]
    cached = [e.usage.cached_tokens for e in ended[::n]]
    answer = sum(e.usage.completion_tokens for e in ended)
    return {
        "prompt_tokens": sum(prompts),
        "completion_tokens": answer,
        "total_tokens": sum(prompts) + answer,
        "prompt_tokens_details": {"cached_tokens": sum(cached)},
    }


def origin(provenance: Provenance | None) -> dict[str, Any]:
    """What a reply says of who answers: its fingerprint and, in an experiment, the arm with its
    adapters. None while nobody does."""
    if provenance is None:
        return {"system_fingerprint": None}
    said: dict[str, Any] = {"system_fingerprint": fingerprint(provenance)}
    if provenance.arm is not None:
        adapters = [
            {"name": a.name, "revision": a.revision, "digest": a.digest, "weight": a.weight}
            for a in provenance.adapters
        ]
        arm = provenance.arm
        said["experiment"] = {"name": arm.experiment, "arm": arm.name, "adapters": adapters}
    return said


def fingerprint(provenance: Provenance) -> str:
    """The same as long as bundle, engine and adapters (with their weights) are the same bytes."""
    parts = [provenance.bundle_digest, provenance.engine_digest]
    parts += [f"{a.digest}*{a.weight!r}" for a in provenance.adapters]
    return "fp_" + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def finish_reason(ended: Finished) -> str:
    """Raises Unavailable when an operator of the device ended the request."""
    if ended.reason is FinishReason.CANCELLED:
        raise Unavailable("the request was cancelled on the device; try again")
    if ended.reason is FinishReason.STOP and ended.tool_calls:
        return "tool_calls"
    return str(ended.reason.value)
