"""Which bytes of a prompt each of its tokens stands for. Pure.

Tokenizers change what they read: they set a blank before the first word, add tokens of their own,
and write `<unk>` for what their vocabulary lacks. A token that the text does not spell stands for
what lies between the tokens that it does.
"""

from __future__ import annotations

from collections.abc import Sequence

# How far the text is searched for one of so many tokens behind one that it does not spell. A prompt
# may be all unknown words, and the time to place its tokens must stay linear.
_NEXT_TOKENS = 4
_NEXT_BYTES = 4096


def rooms(token_ids: Sequence[int], spelled: Sequence[bytes], text: bytes) -> list[int]:
    """Bytes of `text` for each token, in order; `spelled[i]` are the bytes of `token_ids[i]`."""
    found: list[int] = []
    at = 0
    while len(found) < len(spelled):
        first = len(found)
        room = _room(spelled[first], text, at)
        if room is None:
            last, end = _next(token_ids, spelled, text, first, at)
            found += _shared(token_ids[first:last], text[at:end])
            at = end
        else:
            found.append(room)
            at += room
    return found


def _room(raw: bytes, text: bytes, at: int) -> int | None:
    """Of a token that stands here, with or without the blank that the tokenizer set before it."""
    if raw and text.startswith(raw, at):
        return len(raw)
    word = raw.lstrip(b" ")
    return len(word) if word and text.startswith(word, at) else None


def _next(
    token_ids: Sequence[int], spelled: Sequence[bytes], text: bytes, first: int, at: int
) -> tuple[int, int]:
    """(token, position) at which the text goes on behind token `first`, which it does not spell."""
    for index in range(first + 1, min(first + 1 + _NEXT_TOKENS, len(spelled))):
        if _room(spelled[index], text, at) is not None:
            return index, at
        position = text.find(spelled[index], at, at + _NEXT_BYTES) if spelled[index] else -1
        if position >= 0:
            return index, position
    if len(spelled) - first <= _NEXT_TOKENS:
        return len(spelled), len(text)
    among_its_like = token_ids[first] == token_ids[first + 1]
    return first + 1, at + (_character(text, at) if among_its_like else 0)


def _character(text: bytes, at: int) -> int:
    """Bytes of the character there; 0 behind the end."""
    return len(text[at : at + 4].decode(errors="ignore")[:1].encode())


def _shared(token_ids: Sequence[int], gap: bytes) -> list[int]:
    """Of tokens that are not spelled: the gap is of the last one's kind, `<unk>`, a character each
    and the rest the last one's; others, a `<s>` before them, were added."""
    found: list[int] = []
    for token_id in token_ids[:-1]:
        found.append(_character(gap, sum(found)) if token_id == token_ids[-1] else 0)
    return [*found, len(gap) - sum(found)]
