"""Logprobs in the shapes of chat and of plain completions. Pure."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from remora_agent.runtime.api import TokenLogprob
from remora_agent.serving.openai.prompt_text import rooms

TokenBytes = Callable[[int], bytes]
IsSpecial = Callable[[int], bool]
LEAST = -9999.0  # OpenAI's for what has no probability; JSON has no -Infinity


def chat_logprobs(scored: Iterable[TokenLogprob], token_bytes: TokenBytes) -> dict[str, Any]:
    """`{"content": [{token, logprob, bytes, top_logprobs}]}`."""
    return {
        "content": [
            {
                **_token(t.token_id, t.logprob, token_bytes),
                "top_logprobs": [_token(i, p, token_bytes) for i, p in t.top],
            }
            for t in scored
        ],
        "refusal": None,
    }


def _token(token_id: int, logprob: float, token_bytes: TokenBytes) -> dict[str, Any]:
    raw = token_bytes(token_id)
    return {"token": token_text(raw), "logprob": max(logprob, LEAST), "bytes": list(raw)}


def token_text(raw: bytes) -> str:
    """Bytes that are no whole characters are spelled as OpenAI spells them: `bytes:\\xe2\\x82`."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class CompletionLogprobs:
    """Of one answer; offsets go on from part to part. They count characters of the text that the
    caller gets: one in the middle of a character has that character's, a special token that the
    text does not show takes no room."""

    def __init__(self, token_bytes: TokenBytes, is_special: IsSpecial, top: int) -> None:
        self._token_bytes, self._is_special, self._top = token_bytes, is_special, top
        self._characters = _Characters()

    def prompt(
        self, ids: Sequence[int], scored: Sequence[TokenLogprob], text: str
    ) -> dict[str, Any]:
        """`scored` begins with the second token: nothing precedes the first. `text` is the prompt
        as the caller gets it back."""
        given, at, offsets = text.encode(), 0, []
        for room in rooms(ids, [self._token_bytes(i) for i in ids], given):
            offsets.append(self._characters.add(given[at : at + room]))
            at += room
        self._characters = _Characters(len(text))
        made = self._scores([TokenLogprob(ids[0], 0.0), *scored], offsets)
        made["token_logprobs"][0] = None
        if self._top:
            made["top_logprobs"][0] = None
        return made

    def part(self, scored: Sequence[TokenLogprob]) -> dict[str, Any]:
        """`{tokens, token_logprobs, top_logprobs, text_offset}`."""
        offsets = []
        for token in scored:
            hidden = self._is_special(token.token_id)
            offsets.append(
                self._characters.add(b"" if hidden else self._token_bytes(token.token_id))
            )
        return self._scores(scored, offsets)

    def _scores(self, scored: Sequence[TokenLogprob], offsets: list[int]) -> dict[str, Any]:
        tops = [{self._text(i): max(p, LEAST) for i, p in t.top} for t in scored]
        return {
            "tokens": [self._text(t.token_id) for t in scored],
            "token_logprobs": [max(t.logprob, LEAST) for t in scored],
            "top_logprobs": tops if self._top else None,
            "text_offset": offsets,
        }

    def _text(self, token_id: int) -> str:
        return token_text(self._token_bytes(token_id))


class _Characters:
    """How many are complete."""

    def __init__(self, count: int = 0) -> None:
        self._count = count
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, raw: bytes) -> int:
        """The number of the character that `raw` begins with, or goes on with. What was left
        incomplete and is not gone on with is a U+FFFD before it."""
        self._count += len(self._decoder.decode(raw[:1]))
        incomplete, _ = self._decoder.getstate()
        begins = self._count if incomplete or not raw else self._count - 1
        self._count += len(self._decoder.decode(raw[1:]))
        return begins


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Parts of one answer's logprobs as one."""
    names = ("tokens", "token_logprobs", "text_offset")
    whole: dict[str, Any] = {name: [v for p in parts for v in p[name]] for name in names}
    tops = [p["top_logprobs"] for p in parts if p["top_logprobs"] is not None]
    whole["top_logprobs"] = [v for top in tops for v in top] if tops else None
    return whole
