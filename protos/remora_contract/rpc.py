"""RemoraError <-> gRPC status, the one place where they meet.

On the wire an error is a google.rpc.Status with ErrorInfo(reason = class name, domain =
"remora") and, where waiting helps, RetryInfo.
"""

from __future__ import annotations

from typing import NoReturn

import grpc
from google.protobuf.any_pb2 import Any
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from remora_contract import errors

DOMAIN = "remora"
_BY_NAME = {cls.__name__: cls for cls in errors.all_errors()}
_BY_CODE: dict[str, type[errors.RemoraError]] = {
    "INVALID_ARGUMENT": errors.InvalidInput,
    "DATA_LOSS": errors.ArtifactInvalid,
    "UNIMPLEMENTED": errors.Unsupported,
    "NOT_FOUND": errors.NotFound,
    "ABORTED": errors.Conflict,
    "FAILED_PRECONDITION": errors.Refused,
    "RESOURCE_EXHAUSTED": errors.Exhausted,
    "UNAUTHENTICATED": errors.Unauthenticated,
    "PERMISSION_DENIED": errors.Forbidden,
    "UNAVAILABLE": errors.Unavailable,
    "DEADLINE_EXCEEDED": errors.Unavailable,
    "CANCELLED": errors.Cancelled,
    "INTERNAL": errors.InternalFault,
}


def to_status(error: errors.RemoraError) -> grpc.Status:
    """For `context.abort_with_status`."""
    code = grpc.StatusCode[error.code]
    details = [_pack(error_details_pb2.ErrorInfo(reason=_name(error), domain=DOMAIN))]
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(retry_after_s * 1e9))
        details.append(_pack(retry))
    status = status_pb2.Status(code=code.value[0], message=str(error), details=details)
    return rpc_status.to_status(status)


def _name(error: errors.RemoraError) -> str:
    """Of its class, or of the nearest one that the other side knows."""
    return next(cls.__name__ for cls in type(error).__mro__ if _BY_NAME.get(cls.__name__) is cls)


def from_rpc_error(error: grpc.RpcError) -> errors.RemoraError:
    """The error the other side raised, or the nearest one for a plain status."""
    status = rpc_status.from_call(error)
    message = error.details() or error.code().name
    if status is not None:
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        name, retry_after_s = "", None
        for detail in status.details:
            if detail.Unpack(info) and info.domain == DOMAIN:
                name = info.reason
            elif detail.Unpack(retry):
                retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
        if name in _BY_NAME:
            return _make(_BY_NAME[name], message, retry_after_s)
    return _make(_BY_CODE.get(error.code().name, errors.RemoraError), message, None)


def raise_from(error: grpc.RpcError) -> NoReturn:
    raise from_rpc_error(error) from error


def _make(
    cls: type[errors.RemoraError], message: str, retry_after_s: float | None
) -> errors.RemoraError:
    if cls is errors.Incompatible:
        return errors.Refused(message)
    if issubclass(cls, errors.Exhausted):
        return cls(message, retry_after_s)
    return cls(message)


def _pack(message: object) -> Any:
    packed = Any()
    packed.Pack(message)
    return packed
