"""Request parameters: the same words as inputs, and those about the request itself. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from remora_agent.serving.kserve.inputs import TEXT_INPUT, Input, Kind, find_input
from remora_contract.errors import RequestInvalid, Unsupported

EMPTY_FINAL = "triton_enable_empty_final_response"
TIMEOUT = "timeout"
PRIORITY = "priority"
RAW_SIZE = "binary_data_size"
PRIORITY_LEVELS = 100  # 1 goes first; the last is the default
# Parameters of other servers, and why not.
_REFUSED = {
    "sequence_id": "a request holds all its context",
    "sequence_start": "a request holds all its context",
    "sequence_end": "a request holds all its context",
    "headers": "headers are not passed on",
    "binary_data_output": "outputs are always raw here",
    "classification": "the model generates text",
    "shared_memory_region": "shared memory is not supported; send the bytes",
    "shared_memory_offset": "shared memory is not supported; send the bytes",
    "shared_memory_byte_size": "shared memory is not supported; send the bytes",
}
_CHOICES = {
    Kind.INTEGER: ("int64_param", "uint64_param"),
    Kind.NUMBER: ("double_param", "int64_param", "uint64_param"),
    Kind.FLAG: ("bool_param",),
    Kind.TEXT: ("string_param",),
}


@dataclass(frozen=True)
class RequestParameters:
    values: Mapping[str, Any]  # by the input's name as the client wrote it
    empty_final: bool = False
    timeout_s: float | None = None
    priority: int = 0  # higher goes first


def request_parameters(given: Mapping[str, Any]) -> RequestParameters:
    """From InferParameter messages. Raises RequestInvalid, Unsupported naming the parameter."""
    values, own = {}, {}
    for name in sorted(given):
        if name in (EMPTY_FINAL, TIMEOUT, PRIORITY):
            own[name] = _own(name, given[name])
        else:
            values[name] = _value(name, given[name])
    timeout_us, level = own.get(TIMEOUT, 0), own.get(PRIORITY, 0)
    if not 0 <= level <= PRIORITY_LEVELS:
        raise RequestInvalid(
            f"parameter {PRIORITY} must be 1 (first) to {PRIORITY_LEVELS}, or 0 for the last, "
            f"not {level}"
        )
    if timeout_us < 0:
        raise RequestInvalid(f"parameter {TIMEOUT} must be microseconds, not {timeout_us}")
    return RequestParameters(
        values=values,
        empty_final=bool(own.get(EMPTY_FINAL, False)),
        timeout_s=timeout_us / 1e6 if timeout_us else None,
        priority=PRIORITY_LEVELS - level if level else 0,
    )


def check_input_parameters(given: Mapping[str, Any], raw: bytes | None, where: str) -> None:
    """An input's own parameters. KServe's client tells the size of raw values over gRPC too, where
    it adds nothing; no other is known. Raises Unsupported, RequestInvalid."""
    for name in sorted(given):
        if name != RAW_SIZE:
            raise _unknown(name, f"{where}: ")
        told, found = _chosen(name, given[name], Kind.INTEGER), len(raw or b"")
        if told != found:
            raise RequestInvalid(f"{where}: parameter {name} is {told}; {found} raw bytes came")


def refuse_parameters(given: Mapping[str, Any], where: str) -> None:
    """An output's own parameters: none is known. Raises Unsupported, RequestInvalid."""
    for name in sorted(given):
        raise _unknown(name, f"{where}: ")


def _own(name: str, parameter: Any) -> Any:
    kind = Kind.FLAG if name == EMPTY_FINAL else Kind.INTEGER
    return _chosen(name, parameter, kind)


def _value(name: str, parameter: Any) -> Any:
    if name in _REFUSED or name.startswith("triton_"):
        raise _unknown(name, "")
    wanted = find_input(name, "parameter")
    if wanted.name == TEXT_INPUT:
        raise RequestInvalid(f"parameter {name}: the prompt is an input tensor")
    return _as_input(wanted, _chosen(name, parameter, wanted.kind))


def _as_input(wanted: Input, value: Any) -> Any:
    value = float(value) if wanted.kind is Kind.NUMBER else value
    return (value,) if wanted.many else value


def _chosen(name: str, parameter: Any, kind: Kind) -> Any:
    choice = parameter.WhichOneof("parameter_choice")
    if choice not in _CHOICES[kind]:
        raise RequestInvalid(
            f"parameter {name}: {choice or 'no value'}; it takes {' or '.join(_CHOICES[kind])}"
        )
    return getattr(parameter, choice)


def _unknown(name: str, where: str) -> RequestInvalid | Unsupported:
    if name in _REFUSED:
        return Unsupported(f"{where}parameter {name}: not supported; {_REFUSED[name]}")
    return RequestInvalid(f"{where}parameter {name[:80]!r} is unknown")
