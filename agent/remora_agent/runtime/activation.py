"""Activated LoRA: from which prompt token on an adapter acts. Pure; knows no adapters or engines.

As PEFT's generate() decides it: the adapter acts from the first token of the last occurrence of its
invocation tokens in the prompt on, also on all that is generated. Without an occurrence it never
acts; what the model generates is not searched.
"""

from __future__ import annotations

from collections.abc import Sequence


def activation_start(prompt: Sequence[int], invocation: Sequence[int]) -> int | None:
    """Index of the first adapted token; 0 without invocation tokens, None when they do not occur.

    Knuth, Morris and Pratt's search, backwards: len(prompt) + len(invocation) comparisons at most,
    whatever a request and an adapter look like.
    """
    if not invocation:
        return 0
    pattern = invocation[::-1]
    fallbacks = _fallbacks(pattern)
    matched = 0
    for index in range(len(prompt) - 1, -1, -1):
        while matched and pattern[matched] != prompt[index]:
            matched = fallbacks[matched - 1]
        matched += pattern[matched] == prompt[index]
        if matched == len(pattern):
            return index
    return None


def _fallbacks(pattern: Sequence[int]) -> list[int]:
    """For each prefix of the pattern, the length of its longest proper prefix that is a suffix."""
    lengths = [0] * len(pattern)
    for i in range(1, len(pattern)):
        k = lengths[i - 1]
        while k and pattern[i] != pattern[k]:
            k = lengths[k - 1]
        lengths[i] = k + (pattern[i] == pattern[k])
    return lengths
