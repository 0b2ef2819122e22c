"""The bytes that each token adds to a text, for grammars that run over tokens.

Known for the two families of decoders that current models have: byte-level BPE and SentencePiece
with or without byte fallback. Reads a tokenizer; tokenises nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from remora_contract.errors import Unsupported

_SPACE = "\u2581"  # SentencePiece writes a space so
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
# Decoder steps that change nothing within an answer: joining, and taking off the space before the
# first word of a whole text.
_WITHOUT_EFFECT = frozenset({"Fuse", "Strip"})


def token_bytes(tokenizer: Any, vocab: int) -> tuple[list[bytes], list[int]]:
    """Of a tokenizers.Tokenizer: bytes by token id for all ids below `vocab` (empty for an id
    without a token), and the ids of special tokens, which have no place in a text.

    Raises Unsupported for another family of tokenizers.
    """
    read = _reader(_steps(tokenizer.decoder))
    added = {i: t for i, t in tokenizer.get_added_tokens_decoder().items() if i < vocab}
    tokens = [b""] * vocab
    for text, token in tokenizer.get_vocab(with_added_tokens=True).items():
        if token < vocab:
            tokens[token] = text.encode() if token in added else read(text)
    return tokens, [i for i, t in added.items() if t.special]


def _steps(decoder: Any) -> Sequence[Mapping[str, Any]]:
    state = {"type": "none"} if decoder is None else json.loads(decoder.__getstate__())
    return state["decoders"] if state["type"] == "Sequence" else [state]


def _reader(steps: Sequence[Mapping[str, Any]]) -> Any:
    kinds = {s["type"] for s in steps} - _WITHOUT_EFFECT
    if kinds == {"ByteLevel"}:
        table = byte_alphabet()
        return lambda text: b"".join(table.get(c) or c.encode() for c in text)
    replacing = [s for s in steps if s["type"] == "Replace"]
    pieces = all(s["pattern"] == {"String": _SPACE} and s["content"] == " " for s in replacing)
    spaces = all(s.get("replacement") == _SPACE for s in steps if s["type"] == "Metaspace")
    if kinds and kinds <= {"Replace", "ByteFallback", "Metaspace"} and pieces and spaces:
        return _fallback_bytes if "ByteFallback" in kinds else _piece_bytes
    raise Unsupported(
        f"constraint: not for this model's tokenizer (its decoder is {', '.join(sorted(kinds))}; "
        "byte-level and SentencePiece ones are known)"
    )


def _piece_bytes(text: str) -> bytes:
    return text.replace(_SPACE, " ").encode()


def _fallback_bytes(text: str) -> bytes:
    match = _BYTE.match(text)
    return bytes([int(match[1], 16)]) if match else _piece_bytes(text)


def byte_alphabet() -> dict[str, bytes]:
    """The characters by which byte-level BPE writes bytes: printable ones as they are, the others
    from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    pairs = [(chr(b), b) for b in plain] + [(chr(256 + i), b) for i, b in enumerate(others)]
    return {character: bytes([byte]) for character, byte in pairs}
