"""The batch file's answers, in the shape TensorRT Edge-LLM writes, with their provenance. Pure
but for `write_atomically`.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from remora_agent.batch.document import BatchDocument
from remora_agent.batch.runner import Outcome
from remora_agent.runtime.api import Finished, FinishReason
from remora_contract.errors import Exhausted, Refused
from remora_contract.strict import plain


def report(input_file: str, document: BatchDocument, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """`{"input_file", "responses": [...]}`, one response for each request, in order."""
    responses = [_response(document, outcome) for outcome in outcomes]
    return {"input_file": input_file, "responses": responses}


def _response(document: BatchDocument, outcome: Outcome) -> dict[str, Any]:
    request = document.requests[outcome.index]
    response = {
        "output_text": outcome.text,
        "request_idx": outcome.index,
        "batch_idx": outcome.index % document.settings.batch_size,
        "finish_reason": finish_reason(outcome.finished),
        "messages": [
            {"role": m.role, "content": [{"type": "text", "text": m.content}]}
            for m in request.messages
        ],
        "formatted_complete_request": outcome.rendered,
        "lora_name": request.lora_name,
    }
    if outcome.error is not None:
        response["error"] = str(outcome.error)
    if outcome.finished is not None:
        response["remora"] = {
            "provenance": plain(outcome.finished.provenance),
            "usage": plain(outcome.finished.usage),
            "timings": plain(outcome.finished.timings),
            **({"logprobs": plain(outcome.logprobs)} if outcome.logprobs else {}),
            **({} if request.use_case is None else {"use_case": request.use_case.name}),
        }
    return response


def finish_reason(finished: Finished | None) -> str:
    """Edge-LLM's words for it."""
    if finished is None:
        return "error"
    if finished.reason is FinishReason.STOP:
        return "stop-words" if finished.stop_match else "end-of-sequence"
    return "max-length" if finished.reason is FinishReason.LENGTH else "cancelled"


def check_writable(path: Path) -> None:
    """Raises Refused when `write_atomically` would."""
    if path.is_dir():
        raise Refused(f"{path} is a directory; name a file in it")
    descriptor, temporary = _temporary(path)
    os.close(descriptor)
    temporary.unlink()


def write_atomically(path: Path, document: dict[str, Any]) -> None:
    """The whole file or none. Raises Refused (no such folder, no permission), Exhausted (disk)."""
    data = json.dumps(document, indent=4, ensure_ascii=False).encode() + b"\n"
    descriptor, temporary = _temporary(path)
    try:
        with os.fdopen(descriptor, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as e:
        cls = Exhausted if e.errno == errno.ENOSPC else Refused
        raise cls(f"{path} cannot be written: {e.strerror or e}") from e
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> tuple[int, Path]:
    """An open, empty file beside `path`. Raises Refused."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as e:
        raise Refused(f"{path} cannot be written: {e.strerror or e}") from e
    return descriptor, Path(name)
