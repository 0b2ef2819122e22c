"""Our errors as OpenAI's error objects and HTTP statuses: the one place where they meet. Pure."""

from __future__ import annotations

import math
from typing import Any

from remora_contract import errors
from remora_contract.errors import RemoraError, RequestInvalid, Unsupported


class FieldInvalid(RequestInvalid):
    """`param` is the field as the caller wrote it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class FieldUnsupported(Unsupported):
    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelUnknown(errors.NotFound):
    """No such model, adapter or use case."""

    param = "model"


class BodyTooLarge(RequestInvalid):
    pass


class WrongMethod(RequestInvalid):
    pass


class TooSlow(RequestInvalid):
    pass


_REQUEST, _SERVER = "invalid_request_error", "server_error"
# The nearest class of an error's ancestry counts: status, type, code.
_TABLE: dict[type[RemoraError], tuple[int, str, str | None]] = {
    errors.InvalidInput: (400, _REQUEST, None),
    errors.ArtifactInvalid: (500, _SERVER, "artifact_invalid"),
    errors.PromptTooLong: (400, _REQUEST, "context_length_exceeded"),
    BodyTooLarge: (413, _REQUEST, "body_too_large"),
    WrongMethod: (405, _REQUEST, "method_not_allowed"),
    TooSlow: (408, _REQUEST, "request_timeout"),
    errors.Unsupported: (400, _REQUEST, "unsupported_parameter"),
    errors.NotFound: (404, _REQUEST, "not_found"),
    ModelUnknown: (404, _REQUEST, "model_not_found"),
    errors.Conflict: (409, _REQUEST, "conflict"),
    errors.Refused: (400, _REQUEST, "refused"),
    errors.Exhausted: (429, "rate_limit_error", "exhausted"),
    errors.Unauthenticated: (401, "authentication_error", "invalid_api_key"),
    errors.Forbidden: (403, "permission_error", "forbidden"),
    errors.Unavailable: (503, _SERVER, "unavailable"),
    errors.Cancelled: (503, _SERVER, "cancelled"),
    errors.DeadlineExceeded: (504, _SERVER, "deadline_exceeded"),
    errors.InternalFault: (500, _SERVER, "internal_fault"),
    RemoraError: (500, _SERVER, None),
}
_RETRY_S = 5.0  # while a model is loaded or the agent drains


def status_of(error: RemoraError) -> int:
    return _row(error)[0]


def error_object(error: RemoraError) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`."""
    _, kind, code = _row(error)
    param = getattr(error, "param", None)
    return {"error": {"message": str(error), "type": kind, "param": param, "code": code}}


def headers_of(error: RemoraError) -> dict[str, str]:
    """When to come back, in the words that clients heed."""
    if isinstance(error, errors.Exhausted):
        if error.retry_after_s is None:
            return {"x-should-retry": "false"}  # waiting does not help
        return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
    if isinstance(error, errors.Unavailable):
        return {"retry-after": f"{_RETRY_S:.0f}"}
    if isinstance(error, errors.Unauthenticated):
        return {"www-authenticate": "Bearer"}
    return {}


def _row(error: RemoraError) -> tuple[int, str, str | None]:
    return next(_TABLE[cls] for cls in type(error).__mro__ if cls in _TABLE)
