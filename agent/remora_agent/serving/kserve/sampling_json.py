"""The vLLM backend's `sampling_parameters`: one JSON object, its numbers often written as text.

Gives the values of the inputs they mean, and `logit_bias`, which only this form can say. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from remora_agent.serving.json_text import json_table
from remora_agent.serving.kserve.inputs import SAMPLING_PARAMETERS
from remora_contract.errors import RequestInvalid

MAX_CHARS = 64 << 10
_WHERE = SAMPLING_PARAMETERS
_FLAGS = {"true": True, "false": False}


@dataclass(frozen=True)
class SamplingJson:
    values: Mapping[str, Any] = field(default_factory=dict)  # by the input's name
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()


def parse_sampling_json(text: str) -> SamplingJson:
    """Raises RequestInvalid naming the key."""
    if len(text) > MAX_CHARS:
        raise RequestInvalid(f"{_WHERE}: at most {MAX_CHARS} characters")
    given = json_table(text, _WHERE)
    unknown = sorted(set(given) - set(_READ) - {"stop_token_ids", "logit_bias"})
    if unknown:
        raise RequestInvalid(f"{_WHERE}: {unknown[0][:80]!r} is not supported")
    values = {}
    for key, (name, read) in _READ.items():
        if given.get(key) is not None:  # null is vLLM's word for the default
            values[name] = read(key, given[key])
    return SamplingJson(
        values,
        tuple(_integer("stop_token_ids", i) for i in _list(given, "stop_token_ids")),
        _logit_bias(given.get("logit_bias")),
    )


def _list(given: Mapping[str, Any], key: str) -> list[Any]:
    value = given.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise RequestInvalid(f"{_WHERE}: {key} must be a list")
    return value


def _logit_bias(given: Any) -> tuple[tuple[int, float], ...]:
    if given is None:
        return ()
    if not isinstance(given, dict):
        raise RequestInvalid(f"{_WHERE}: logit_bias must be an object of token ids and numbers")
    pairs = [(_integer("logit_bias", k), _number("logit_bias", v)) for k, v in given.items()]
    return tuple(sorted(pairs))


def _number(key: str, value: Any) -> float:
    if not isinstance(value, bool) and isinstance(value, str | int | float):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    raise RequestInvalid(f"{_WHERE}: {key} must be a number, not {value!r:.60}")


def _integer(key: str, value: Any) -> int:
    if not isinstance(value, bool) and isinstance(value, str | int):
        try:
            return int(value)
        except ValueError:
            pass
    raise RequestInvalid(f"{_WHERE}: {key} must be a whole number, not {value!r:.60}")


def _top_k(key: str, value: Any) -> int:
    """-1 is vLLM's word for all."""
    number = _integer(key, value)
    return 0 if number == -1 else number


def _flag(key: str, value: Any) -> bool:
    found = _FLAGS.get(value.lower(), value) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise RequestInvalid(f"{_WHERE}: {key} must be true or false, not {value!r:.60}")
    return found


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RequestInvalid(f"{_WHERE}: {key} must be text, not {value!r:.60}")
    return value


def _texts(key: str, value: Any) -> tuple[str, ...]:
    return tuple(_text(key, v) for v in (value if isinstance(value, list) else [value]))


_READ: Mapping[str, tuple[str, Callable[[str, Any], Any]]] = {
    "max_tokens": ("max_tokens", _integer),
    "min_tokens": ("min_tokens", _integer),
    "temperature": ("temperature", _number),
    "top_k": ("top_k", _top_k),
    "top_p": ("top_p", _number),
    "min_p": ("min_p", _number),
    "seed": ("seed", _integer),
    "repetition_penalty": ("repetition_penalty", _number),
    "presence_penalty": ("presence_penalty", _number),
    "frequency_penalty": ("frequency_penalty", _number),
    "ignore_eos": ("ignore_eos", _flag),
    "stop": ("stop_words", _texts),
    "n": ("num_return_sequences", _integer),
    "lora_name": ("lora_name", _text),
}
