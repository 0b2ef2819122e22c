"""The bytes that each token adds to a text, for grammars that run over tokens and for
logprobs.

Known for the two families of decoders that current models have: byte-level BPE and SentencePiece
with or without byte fallback. Reads a tokenizer; tokenises nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
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


def bytes_of_one(tokenizer: Any) -> Callable[[int], bytes]:
    """The same for one id at a time; of another family of tokenizers the id's own decoding."""
    tokens = tokenizer.get_added_tokens_decoder()
    added: dict[int, bytes] = {i: t.content.encode() for i, t in tokens.items()}
    try:
        read = _reader(_steps(tokenizer.decoder))
    except Unsupported:
        return lambda i: str(tokenizer.decode([i], skip_special_tokens=False)).encode()

    def of(token_id: int) -> bytes:
        if token_id in added:
            return added[token_id]
        piece = tokenizer.id_to_token(token_id)
        return b"" if piece is None else bytes(read(piece))

    return of


def _steps(decoder: Any) -> Sequence[Mapping[str, Any]]:
    state: dict[str, Any] = {"type": "none"}
    if decoder is not None:
        state = json.loads(decoder.__getstate__())
    steps: list[dict[str, Any]] = state.get("decoders", [state])
    return steps


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
