"""What a cached prefix is known by: content, never names. Pure.

A sequence is cut into blocks of BLOCK tokens. The key of a block is

    key[i] = SHA-256(key[i - 1], tokens of block i, the adapters that act on it)
    key[-1] = SHA-256(engine digest, salt[, "switched": of a sequence past the engine's switch])

so equal keys mean equal tokens from the first on, read by the same engine through the same adapters
with the same weights. An adapter counts in a block from where it acts on, which for an activated
one may be inside the prompt: what comes before is shared with requests that do not use it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK = 32
_FORMAT = b"remora prefix 1"
_SWITCHED = b"switched"


@dataclass(frozen=True)
class Acting:
    """An adapter of a request."""

    digest: str
    weight: float
    start: int  # the first token it acts on


class PrefixKeys:
    """The keys of one sequence's whole blocks, made as they are asked for."""

    def __init__(
        self, engine_digest: str, salt: str, acting: Sequence[Acting], *, switched: bool = False
    ) -> None:
        """`switched`: the sequence is longer than `EngineLimits.switch`."""
        self._of = engine_digest, salt
        self._acting = tuple(acting)
        self._keys: list[bytes] = []
        kind = [_SWITCHED] if switched else []
        self._root = _sha256(_FORMAT, engine_digest.encode(), salt.encode(), *kind)

    def switched(self) -> PrefixKeys:
        """Those of the same sequence once it has grown longer than the switch."""
        return PrefixKeys(*self._of, self._acting, switched=True)

    def of(self, tokens: Sequence[int], blocks: int) -> Sequence[bytes]:
        """The first `blocks` keys of a sequence that begins with `tokens`; the same sequence each
        time, perhaps longer."""
        for i in range(len(self._keys), blocks):
            begin, end = i * BLOCK, (i + 1) * BLOCK
            before = self._keys[-1] if self._keys else self._root
            ids = np.array(tokens[begin:end], "<u4").tobytes()
            self._keys.append(_sha256(before, ids, *self._mix(begin, end)))
        return self._keys[:blocks]

    def _mix(self, begin: int, end: int) -> list[bytes]:
        """In the request's order, in which what they add is summed up."""
        return [
            a.digest.encode() + struct.pack("<dI", a.weight, max(0, a.start - begin))
            for a in self._acting
            if a.start < end
        ]


def _sha256(*parts: bytes) -> bytes:
    made = hashlib.sha256()
    for part in parts:
        made.update(struct.pack("<Q", len(part)))
        made.update(part)
    return made.digest()
