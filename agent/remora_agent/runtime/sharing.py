"""Bounds of what a request says about its competition with others. Pure."""

from __future__ import annotations

from remora_agent.runtime.api import Share
from remora_agent.runtime.jobs import MAX_PRIORITY
from remora_agent.runtime.options import MAX_CLIENT_CHARS, MAX_SALT_CHARS
from remora_contract.errors import RequestInvalid


def check_share(share: Share) -> None:
    """Raises RequestInvalid."""
    if abs(share.priority) > MAX_PRIORITY:
        raise RequestInvalid(f"priority must be in ±{MAX_PRIORITY}, not {share.priority}")
    texts = [
        ("client", share.client, MAX_CLIENT_CHARS),
        ("cache_salt", share.cache_salt, MAX_SALT_CHARS),
    ]
    for name, text, most in texts:
        if len(text) > most or not text.isprintable():
            raise RequestInvalid(f"{name} must be at most {most} printable characters")
