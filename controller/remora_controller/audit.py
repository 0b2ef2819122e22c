"""The audit log: who asked for what, from where, and what came of it. Pure.

Every change is two entries: one before it happens, one with its result; a change without a result
was cut off by the controller's end. Each entry's hash covers the entry and the hash before it, so
that an entry that was altered or taken out is noticed; whoever can write the database can also
write the whole chain anew, which only a head noted elsewhere (`remora audit --head`) gives away.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

NO_HASH = ""
MAX_MESSAGE = 1024


@dataclass(frozen=True)
class AuditDraft:
    """`answers` is the entry that this one gives the `result` of; None while it asks."""

    at: float
    who: str
    role: str
    where: str
    what: str
    detail_json: str = "{}"
    answers: int | None = None
    result: str = ""
    message: str = ""


@dataclass(frozen=True)
class AuditHead:
    seq: int
    hash: str


@dataclass(frozen=True)
class AuditEntry:
    draft: AuditDraft
    seq: int  # from 1, without gaps
    hash: str


def concluded(asked: AuditEntry, at: float, result: str, message: str) -> AuditDraft:
    """What came of what was asked."""
    return replace(
        asked.draft,
        at=at,
        detail_json="{}",
        answers=asked.seq,
        result=result,
        message=message[:MAX_MESSAGE],
    )


def chained(draft: AuditDraft, head: AuditHead) -> AuditEntry:
    """The entry that follows `head`."""
    seq = head.seq + 1
    return AuditEntry(draft, seq, _hash(draft, seq, head.hash))


def check_chain(entries: Iterable[AuditEntry], head: AuditHead) -> str | None:
    """What is wrong with the whole log, from entry 1 on; None when nothing is."""
    at = AuditHead(0, NO_HASH)
    for entry in entries:
        if entry.seq != at.seq + 1:
            return f"entries {at.seq + 1} to {entry.seq - 1} are missing"
        if entry.hash != _hash(entry.draft, entry.seq, at.hash):
            return f"entry {entry.seq} is not what was written, or follows what was not"
        at = AuditHead(entry.seq, entry.hash)
    if at.seq < head.seq:
        return f"entries {at.seq + 1} to {head.seq} are missing"
    return None if at == head else f"the head says {head.seq}:{head.hash}, not {at.seq}:{at.hash}"


def _hash(draft: AuditDraft, seq: int, before: str) -> str:
    values = [getattr(draft, field.name) for field in fields(draft)]
    text = json.dumps([before, seq, *values], separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
