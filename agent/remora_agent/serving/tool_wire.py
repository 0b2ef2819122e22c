"""Tools and their calls on the gRPC wire: JSON text <-> the agent's own words. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from remora_agent.runtime.api import ToolCall
from remora_agent.serving.json_text import json_value
from remora_contract.errors import DocumentInvalid, RequestInvalid
from remora_contract.strict import parse
from remora_protos.inference.v1 import inference_pb2 as pb

MAX_JSON_CHARS = 1 << 20


@dataclass(frozen=True)
class _Objects:
    items: tuple[dict[str, Any], ...]


def objects(text: str, where: str) -> tuple[Mapping[str, Any], ...]:
    """A JSON array of objects; empty text is none. Raises RequestInvalid."""
    if not text:
        return ()
    if len(text) > MAX_JSON_CHARS:
        raise RequestInvalid(f"{where}: at most {MAX_JSON_CHARS} characters")
    try:
        # Depth, numbers and text are bounded here.
        return parse(_Objects, {"items": json_value(text, where)}, where).items
    except DocumentInvalid as e:
        raise RequestInvalid(f"{where} must be an array of JSON objects: {e}") from e


def tool_call(call: ToolCall) -> pb.ToolCall:
    return pb.ToolCall(id=call.id, name=call.name, arguments_json=call.arguments_json)
