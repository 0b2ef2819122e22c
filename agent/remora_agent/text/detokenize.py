"""Token ids to text, one token at a time, never half a character.

A window of recent ids is decoded anew at each token and what is new is handed out. The window
starts at ids already handed out (first: the prompt's last ones), because decoders of the
sentencepiece kind drop the space before the first token they see. Trailing U+FFFD is held back: it
stands for bytes whose character is not complete yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 8
# Byte-fallback decoders turn every byte of an incomplete run into its own U+FFFD, those of complete
# characters before it included: of the context's, and of three of a character's four bytes.
MAX_HELD = CONTEXT_TOKENS + 3
MAX_WINDOW = 64  # tokens decoded anew at most

# Token ids -> text, special tokens skipped.
Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Of one answer. The texts of all `push`es and of `flush` joined are what the ids add to the
    prompt's decoding."""

    def __init__(self, decode: Decode, prompt: Sequence[int]) -> None:
        self._decode = decode
        self._ids = _context(decode, prompt)
        self._clean = len(self._ids)  # ids up to here are handed out completely
        self._given = len(_stable(decode(self._ids))) if self._ids else 0
        self._holds = False

    @property
    def holds(self) -> bool:
        """Whether bytes wait for the rest of their character."""
        return self._holds

    def push(self, token_id: int) -> str:
        """The characters this token completes; empty while one is incomplete."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        stable = _stable(text)
        new = stable[self._given :]
        self._given = max(self._given, len(stable))
        self._holds = len(stable) < len(text)
        if new and not self._holds:
            self._move_to(self._clean)
        elif len(self._ids) > MAX_WINDOW:
            self._move_to(len(self._ids) - MAX_HELD)
        return new

    def flush(self) -> str:
        """What is still held back, when no token follows: U+FFFD for bytes whose character never
        became complete."""
        new = self._decode(self._ids)[self._given :] if self._holds else ""
        self._given += len(new)
        self._holds = False
        return new

    def _move_to(self, start: int) -> None:
        """Drops ids before `start` from the window; the rest stays as context."""
        self._ids = self._ids[start:]
        self._clean = len(self._ids)
        self._given = len(_stable(self._decode(self._ids)))


def _context(decode: Decode, prompt: Sequence[int]) -> list[int]:
    """The prompt's last ids, from the border of a character on."""
    ids = list(prompt[-CONTEXT_TOKENS:])
    while ids and REPLACEMENT in decode(ids):
        del ids[0]
    return ids


def _stable(text: str) -> str:
    """`text` without what the next token may still change."""
    held = len(text) - len(text.rstrip(REPLACEMENT))
    return text[: len(text) - min(held, MAX_HELD)]
