"""Logprobs in the shapes of chat and of plain completions. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from remora_agent.runtime.api import TokenLogprob

TokenBytes = Callable[[int], bytes]
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
    """Of one answer; offsets go on from part to part."""

    def __init__(self, token_bytes: TokenBytes, top: int) -> None:
        self._token_bytes, self._top = token_bytes, top
        self._offset = 0

    def prompt(self, ids: Sequence[int], scored: Sequence[TokenLogprob]) -> dict[str, Any]:
        """`scored` begins with the second token: nothing precedes the first."""
        first = TokenLogprob(ids[0], 0.0)
        made = self.part([first, *scored])
        made["token_logprobs"][0] = None
        if self._top:
            made["top_logprobs"][0] = None
        return made

    def part(self, scored: Iterable[TokenLogprob]) -> dict[str, Any]:
        """`{tokens, token_logprobs, top_logprobs, text_offset}`."""
        tokens, offsets, values, tops = [], [], [], []
        for token in scored:
            text = self._text(token.token_id)
            tokens.append(text)
            offsets.append(self._offset)
            values.append(max(token.logprob, LEAST))
            tops.append({self._text(i): max(p, LEAST) for i, p in token.top})
            self._offset += len(text)
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": tops if self._top else None,
            "text_offset": offsets,
        }

    def _text(self, token_id: int) -> str:
        return token_text(self._token_bytes(token_id))


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Parts of one answer's logprobs as one."""
    names = ("tokens", "token_logprobs", "text_offset")
    whole: dict[str, Any] = {name: [v for p in parts for v in p[name]] for name in names}
    tops = [p["top_logprobs"] for p in parts if p["top_logprobs"] is not None]
    whole["top_logprobs"] = [v for top in tops for v in top] if tops else None
    return whole
