"""Content identities: sha256 of bytes, and of documents in one canonical JSON form."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from remora_contract.errors import DocumentInvalid
from remora_contract.strict import plain

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_READ_BYTES = 1 << 20


def digest_bytes(data: bytes | memoryview) -> str:
    """`sha256:<hex>` of the bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    hasher = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(_READ_BYTES):
            hasher.update(block)
    return "sha256:" + hasher.hexdigest()


def canonical_json(document: Any) -> bytes:
    """Sorted keys, no spaces, UTF-8, finite numbers only: equal documents give equal bytes."""
    return json.dumps(
        plain(document), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def digest_document(document: Any) -> str:
    return digest_bytes(canonical_json(document))


def check_digest(text: str, what: str = "digest") -> str:
    """Returns `text` when it has the form of a digest. Raises DocumentInvalid: it may become a
    path, so nothing else is let through."""
    if not _DIGEST.fullmatch(text):
        raise DocumentInvalid(f"{what} must look like sha256:<64 hex digits>, not {text[:80]!r}")
    return text


def hex_of(digest: str) -> str:
    return check_digest(digest).removeprefix("sha256:")


def short(digest: str) -> str:
    """For people: the first 12 hex digits."""
    return digest.removeprefix("sha256:")[:12]
