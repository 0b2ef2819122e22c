"""The bytes that one token stands for, whatever its neighbours. Knows the two ways in which
tokenizers spell bytes: byte-level alphabets (GPT-2's), and <0x0A> pieces beside U+2581 for spaces.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"


def token_bytes(tokenizer: Any) -> Callable[[int], bytes]:
    """For a tokenizers.Tokenizer; b"" for an id without a token."""
    added: dict[int, bytes] = {
        i: t.content.encode() for i, t in tokenizer.get_added_tokens_decoder().items()
    }
    spelled = _byte_level if _is_byte_level(tokenizer) else _sentence_piece

    def of(token_id: int) -> bytes:
        if token_id in added:
            return added[token_id]
        piece = tokenizer.id_to_token(token_id)
        return b"" if piece is None else spelled(piece)

    return of


def _is_byte_level(tokenizer: Any) -> bool:
    decoder = tokenizer.decoder
    return decoder is not None and b"ByteLevel" in decoder.__getstate__()


def _byte_level(piece: str) -> bytes:
    alphabet = _alphabet()
    return b"".join(bytes([alphabet[c]]) if c in alphabet else c.encode() for c in piece)


def _sentence_piece(piece: str) -> bytes:
    if found := _BYTE_PIECE.fullmatch(piece):
        return bytes([int(found[1], 16)])
    return piece.replace(_SPACE, " ").encode()


@cache
def _alphabet() -> dict[str, int]:
    """Printable bytes stand for themselves, the others for the characters from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    table = {chr(b): b for b in plain}
    return table | {chr(256 + i): b for i, b in enumerate(others)}
