"""One log line for each request that has ended. Texts only when asked for."""

from __future__ import annotations

import logging
from enum import Enum

from remora_agent.telemetry.records import RequestRecord
from remora_contract.digests import short

log = logging.getLogger("remora.requests")
_MAX_ERROR_CHARS = 500


class RequestLog(str, Enum):
    OFF = "off"
    SUMMARY = "summary"  # counts, times and digests
    TEXT = "text"  # the prompt and the answer too


def write(record: RequestRecord) -> None:
    """A sink of request records."""
    times = record.timings
    fields: dict[str, object] = {
        "request_id": record.request_id,
        "client": record.client,
        "caller": record.caller,
        "model": record.origin.model,
        "use_case": record.origin.use_case,
        "adapters": [
            {"name": a.name, "digest": short(a.digest), "weight": a.weight} for a in record.adapters
        ],
        "outcome": record.outcome,
        "prompt_tokens": record.usage.prompt_tokens,
        "cached_tokens": record.usage.cached_tokens,
        "completion_tokens": record.usage.completion_tokens,
        "total_s": round(record.total_s, 4),
    }
    if times is not None:
        fields |= {
            "queue_s": round(times.queue_s, 4),
            "prefill_s": round(times.prefill_s, 4),
            "decode_s": round(times.decode_s, 4),
            "time_to_first_token_s": round(times.time_to_first_token_s, 4),
        }
    if record.error:
        fields["error"] = record.error[:_MAX_ERROR_CHARS]
    if record.origin.prompt_text is not None:
        fields |= {"prompt": record.origin.prompt_text, "answer": record.answer_text}
    log.info("request.ended", extra={k: v for k, v in fields.items() if v not in ("", [])})
