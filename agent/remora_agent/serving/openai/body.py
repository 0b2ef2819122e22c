"""A request's body: bytes become a JSON object, or a refusal that says why. Pure.

Its size is bounded before, by whoever reads the bytes.
"""

from __future__ import annotations

from typing import Any

from remora_agent.serving.json_text import json_table
from remora_agent.serving.openai.errors import FieldInvalid
from remora_contract.errors import RequestInvalid

MAX_BODY_BYTES = 4 << 20


def json_object(body: bytes) -> dict[str, Any]:
    """Raises FieldInvalid: not UTF-8, or what `json_table` refuses."""
    try:
        text = body.decode()
    except UnicodeDecodeError as e:
        raise FieldInvalid(f"the body is not UTF-8 at byte {e.start}") from e
    try:
        return json_table(text, "the body")
    except RequestInvalid as e:
        raise FieldInvalid(str(e)) from e
