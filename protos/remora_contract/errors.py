"""Every error Remora raises on purpose, and the status each one travels as.

RemoraError
├── InvalidInput            the caller's bytes or words are wrong
│   ├── DocumentInvalid     a JSON, TOML or YAML document does not say what its schema needs
│   ├── CheckpointInvalid   a checkpoint is truncated, incomplete or shaped otherwise than it says
│   ├── AdapterInvalid      an adapter cannot be carried faithfully
│   ├── ArtifactInvalid     a bundle or published artifact is damaged
│   ├── PromptTooLong       more tokens than the context holds
│   └── RequestInvalid      a request's field is out of range
│       └── UsageWrong      a command was typed wrongly: it ends with status 2
├── Unsupported             known and not implemented; named, never ignored
│   └── NoFusedKernel       a backend has no kernel for an operator of the native graph
├── NotFound                the named thing does not exist
├── Conflict                it exists already, or moved on (lost compare-and-swap)
├── Refused                 the state of the system forbids it now
│   └── Incompatible        this device cannot run that; carries its refusals
├── Exhausted               memory, disk, rank or queue is full
├── Unauthenticated         who you are could not be established
├── Forbidden               you are known and may not
├── Unavailable             try again later: starting, draining, unreachable
├── Cancelled               the caller gave up
├── DeadlineExceeded        the caller's deadline passed before the answer was complete
└── InternalFault           a promise of our own was broken
    └── EngineFault         an engine build or run failed

A class's `code` is a name of grpc.StatusCode and also travels as google.rpc.ErrorInfo.reason by
the class name; `remora_contract.rpc` converts both ways. Owns no I/O.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar


@dataclass(frozen=True)
class Refusal:
    """Why something may not happen: a value, so that all reasons can be shown at once."""

    code: str
    need: str
    have: str

    def __str__(self) -> str:
        return f"{self.code}: needs {self.need}, has {self.have}"


_Error = TypeVar("_Error", bound="RemoraError")


class RemoraError(Exception):
    """Root of all deliberate errors. The text says what is wrong and what to do next."""

    code = "UNKNOWN"


class InvalidInput(RemoraError):
    code = "INVALID_ARGUMENT"


class DocumentInvalid(InvalidInput):
    pass


class CheckpointInvalid(InvalidInput):
    pass


class AdapterInvalid(InvalidInput):
    pass


class ArtifactInvalid(InvalidInput):
    code = "DATA_LOSS"


class PromptTooLong(InvalidInput):
    pass


class RequestInvalid(InvalidInput):
    pass


class UsageWrong(RequestInvalid):
    pass


class Unsupported(RemoraError):
    code = "UNIMPLEMENTED"


class NoFusedKernel(Unsupported):
    pass


class NotFound(RemoraError):
    code = "NOT_FOUND"


class Conflict(RemoraError):
    code = "ABORTED"


class Refused(RemoraError):
    code = "FAILED_PRECONDITION"


class Incompatible(Refused):
    def __init__(self, refusals: Sequence[Refusal]) -> None:
        super().__init__("; ".join(map(str, refusals)))
        self.refusals = tuple(refusals)


class Exhausted(RemoraError):
    """`retry_after_s` is set where waiting helps and tells how long."""

    code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unauthenticated(RemoraError):
    code = "UNAUTHENTICATED"


class Forbidden(RemoraError):
    code = "PERMISSION_DENIED"


class Unavailable(RemoraError):
    code = "UNAVAILABLE"


class Cancelled(RemoraError):
    code = "CANCELLED"


class DeadlineExceeded(RemoraError):
    code = "DEADLINE_EXCEEDED"


class InternalFault(RemoraError):
    code = "INTERNAL"


class EngineFault(InternalFault):
    pass


def all_errors(root: type[RemoraError] = RemoraError) -> Iterator[type[RemoraError]]:
    """Every class of this module's tree, root first: what the wire tells apart. Those that others
    derive travel as the one they derive from."""
    yield root
    for child in root.__subclasses__():
        if child.__module__ == __name__:
            yield from all_errors(child)


def anew(error: _Error) -> _Error:
    """The same error as an object of its own, for one that is kept and raised again: each raise
    adds to an exception the frames that it passes, with all that they hold."""
    made = type(error).__new__(type(error), *error.args)
    made.__dict__.update(error.__dict__)
    return made
