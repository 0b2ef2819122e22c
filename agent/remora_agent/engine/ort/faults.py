"""What ONNX Runtime and numpy raise, as our errors: no memory is told apart from a fault.

The runtime's exceptions share no base class, and those of a step carry no code, only text.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from remora_contract.errors import EngineFault, Exhausted, RemoraError

RETRY_AFTER_S = 1.0  # when other requests may have ended
# As ONNX Runtime 1.23 to 1.32 say it: its arena, refused by the system and by its own limit; an
# allocation outside of it.
_NO_MEMORY = (
    "Failed to allocate memory for requested buffer",
    "is smaller than requested bytes",
    "std::bad_alloc",
)
_ADVICE = "serve fewer rows or a shorter context, or free memory of the system"
_MAX_QUOTED = 300


def fault(error: Exception, what: str) -> RemoraError:
    """The error to raise from `error`; `what` begins its text: "onnxruntime failed in a step"."""
    said = " ".join(str(error).split())[:_MAX_QUOTED]
    if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
        return Exhausted(f"{what} for want of memory ({said}); {_ADVICE}", RETRY_AFTER_S)
    return EngineFault(f"{what}: {said}")


class _HalfMade(Protocol):
    def drop_half_made(self) -> None:
        """Lets go of what is made again when it is needed."""


_Engine = TypeVar("_Engine", bound=_HalfMade)
_Arguments = ParamSpec("_Arguments")
_Answer = TypeVar("_Answer")


def survives_no_memory(
    call: Callable[Concatenate[_Engine, _Arguments], _Answer],
) -> Callable[Concatenate[_Engine, _Arguments], _Answer]:
    """Of an engine's method: numpy having no memory ends this call only, with Exhausted."""

    @wraps(call)
    def checked(engine: _Engine, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Answer:
        try:
            return call(engine, *args, **kwargs)
        except MemoryError as e:
            engine.drop_half_made()
            raise fault(e, f"{call.__name__} failed") from e

    return checked
