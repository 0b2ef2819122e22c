"""What the agent and the process that runs TensorRT Edge-LLM say to each other: a JSON object a
line.

    -> {"do": "generate", "question": {...}} | {"do": "cancel"}
    <- {"say": "ready"}                                              once, when the engine is open
    <- {"say": "chunk", "text": str, "ids": [int]}                   as they come
    <- {"say": "end", "reason": "stop" | "length" | "cancelled", "prompt_tokens": int}
    <- {"say": "error", "error": class name, "message": str}         instead of ready or end
"""

from __future__ import annotations

import json
from typing import Any

MAX_LINE_BYTES = 16 << 20


def line_of(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def parse(line: bytes) -> dict[str, Any]:
    """Raises ValueError for what is no object on one line."""
    if len(line) > MAX_LINE_BYTES or not line.endswith(b"\n"):
        raise ValueError("a line that is too long or has no end")
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("a line that is no JSON object")
    return message
