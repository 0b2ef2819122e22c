"""A client call's arguments as wire messages. Pure; nonsense is refused before it is sent."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypedDict, TypeVar, cast

from remora_contract.errors import RequestInvalid
from remora_protos.inference.v1 import inference_pb2 as pb

P = ParamSpec("P")
T = TypeVar("T")
# Chat messages {"role": …, "content": …}; an assistant's may have "tool_calls", a tool's
# "tool_call_id".
Messages = Sequence[Mapping[str, Any]]
# A prompt as text or as token ids; messages are taken in its place too.
Prompt = str | Sequence[int] | Messages
# What `embed` takes: one text or several, each as text or as token ids.
EmbedInputs = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
# One adapter by name, `name@revision`, or a mix of several with weights.
AdapterChoice = str | Mapping[str, float] | None


class Options(TypedDict, total=False):
    """Keyword arguments of `generate` and `stream`; missing or None takes the agent's default."""

    adapter: AdapterChoice
    use_case: str | None
    weights: Mapping[str, float]  # beside use_case: of some of its adapters, for this call alone
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]  # token id to what its logit gets
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    min_tokens: int
    json_schema: str | Mapping[str, Any]  # one of these five at most: what the answer must be
    json_object: bool
    regex: str
    lark: str
    choice: str | Sequence[str]
    logprobs: int  # of each token of the answer, and of that many of the likeliest
    prompt_logprobs: int  # the same of each token of the prompt but the first
    n: int  # independent answers; those after the first are the result's `more`
    echo: bool  # the text begins with the prompt's
    add_generation_prompt: bool
    template_arguments: Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]]  # {"type": "function", "function": {"name", …}} each
    tool_choice: str  # auto, none, required or a function's name
    request_id: str
    priority: int  # higher goes first among those that wait
    client: str  # who shares the rows fairly with other clients; missing: the connection's identity
    cache_salt: str  # prefixes are cached apart for each
    session: str  # whose arm of an experiment it gets; missing: the client's, else drawn


_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_OF_CHATS = ("add_generation_prompt", "template_arguments", "tools", "tool_choice")
_OF_MESSAGES = frozenset({"role", "content", "tool_calls", "tool_call_id", "name"})
_STOPPING = ("max_tokens", "ignore_eos", "min_tokens")
_POOLING = {"last": pb.POOLING_LAST, "mean": pb.POOLING_MEAN}
_CONSTRAINTS = ("json_schema", "json_object", "regex", "lark", "choice")
_SHARE = ("priority", "client", "cache_salt", "session")
_KNOWN = frozenset(Options.__annotations__)


def sendable(make: Callable[P, T]) -> Callable[P, T]:
    """`make` builds a message. What protobuf cannot carry is RequestInvalid: a number out of the
    field's range, half a surrogate pair, a value of another type."""

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return make(*args, **kwargs)
        except (ValueError, TypeError) as e:
            raise RequestInvalid(f"an argument cannot be sent: {e}") from e

    return made


def one_input(prompt: Prompt | None, messages: Messages | None) -> Prompt:
    """Raises RequestInvalid unless exactly one is given."""
    if prompt is not None and messages is None:
        return prompt
    if messages is not None and prompt is None:
        return messages
    raise RequestInvalid("give messages=… or a prompt, one of the two")


@sendable
def generate_request(prompt: Prompt, options: Options) -> pb.GenerateRequest:
    """Raises RequestInvalid."""
    options = cast(Options, {k: v for k, v in options.items() if v is not None})
    unknown = sorted(set(options) - _KNOWN)
    if unknown:
        raise RequestInvalid(f"unknown option {unknown[0]!r} (known: {', '.join(sorted(_KNOWN))})")
    request = pb.GenerateRequest(request_id=options.get("request_id", ""))
    _set_input(request, prompt, options)
    _set_adapters(request, options)
    _set_numbers(request, options)
    _set_constraint(request, options)
    _set_choices(request, options)
    return request


def _set_input(request: pb.GenerateRequest, prompt: Prompt, options: Options) -> None:
    if not isinstance(prompt, str) and len(prompt) == 0:
        raise RequestInvalid("the prompt is empty")
    if not isinstance(prompt, str) and isinstance(prompt[0], Mapping):
        request.chat.CopyFrom(chat(prompt, options))
        return
    for name in _OF_CHATS:
        if name in options:
            raise RequestInvalid(f"{name} goes with chat messages, not with a plain prompt")
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)  # type: ignore[arg-type]


def chat(messages: Sequence[Any], options: Options) -> pb.Chat:
    """Raises RequestInvalid when a message has a key that none has."""
    made = pb.Chat()
    for message in messages:
        _add_message(made, message)
    if options.get("tools"):
        made.tools_json = json.dumps(list(options["tools"]))
    made.tool_choice = options.get("tool_choice", "")
    if "add_generation_prompt" in options:
        made.add_generation_prompt = options["add_generation_prompt"]
    if options.get("template_arguments"):
        made.template_arguments_json = json.dumps(options["template_arguments"])
    return made


def _add_message(made: pb.Chat, message: Mapping[str, Any]) -> None:
    given = {name: value for name, value in message.items() if value is not None}
    if "role" not in given or not set(given) <= _OF_MESSAGES:
        raise RequestInvalid(
            f"a message has role and content, and may have {', '.join(sorted(_OF_MESSAGES))}; "
            f"not {sorted(message)}"
        )
    if "content" not in given and not given.get("tool_calls"):
        raise RequestInvalid("a message without tool_calls needs its content")
    calls = given.pop("tool_calls", ())
    made.messages.add(**given, tool_calls_json=json.dumps(list(calls)) if calls else "")


def _set_adapters(request: pb.GenerateRequest, options: Options) -> None:
    choice, use_case = options.get("adapter"), options.get("use_case")
    if choice is not None and use_case is not None:
        raise RequestInvalid("give adapter or use_case, not both")
    if "weights" in options and use_case is None:
        raise RequestInvalid("weights go with use_case; a mix is adapter={name: weight}")
    if use_case is not None:
        request.use_case = use_case
        for name, weight in options.get("weights", {}).items():
            request.use_case_weights.add(name=name, weight=weight)
    elif choice is None:
        request.none.SetInParent()
    else:
        request.adapters.adapters.extend(mix(choice))


def mix(choice: str | Mapping[str, float]) -> list[pb.WeightedAdapter]:
    """`name`, `name@revision`, or {name or name@revision: weight}. Raises RequestInvalid."""
    pairs = {choice: 1.0} if isinstance(choice, str) else choice
    if not pairs:
        raise RequestInvalid("the adapter mix is empty; say adapter=None for the base model")
    made = []
    for text, weight in pairs.items():
        name, at, revision = text.partition("@")
        if at and not revision:
            raise RequestInvalid(f"{text!r} names no revision behind the @; leave the @ out")
        made.append(pb.WeightedAdapter(name=name, revision=revision, weight=weight))
    return made


def embed_request(
    inputs: EmbedInputs,
    pooling: str,
    normalize: bool,
    adapter: AdapterChoice,
    use_case: str | None,
) -> pb.EmbedRequest:
    """Raises RequestInvalid."""
    if adapter is not None and use_case is not None:
        raise RequestInvalid("give adapter or use_case, not both")
    if pooling not in _POOLING:
        raise RequestInvalid(f"pooling {pooling!r} is not one of {', '.join(_POOLING)}")
    request = pb.EmbedRequest(pooling=_POOLING[pooling], normalize=normalize)
    for prompt in _several(inputs):
        if isinstance(prompt, str):
            request.inputs.add(text=prompt)
        else:
            request.inputs.add(token_ids=pb.TokenIds(ids=prompt))
    if use_case is not None:
        request.use_case = use_case
    elif adapter is not None:
        request.adapters.adapters.extend(mix(adapter))
    return request


def _several(inputs: EmbedInputs) -> Sequence[str | Sequence[int]]:
    if isinstance(inputs, str) or (len(inputs) and isinstance(inputs[0], int)):
        return [cast("str | Sequence[int]", inputs)]
    return cast("Sequence[str | Sequence[int]]", inputs)


def _set_numbers(request: pb.GenerateRequest, options: Options) -> None:
    given: Mapping[str, Any] = options  # by name below
    for name in _SAMPLING:
        if name in given:
            setattr(request.sampling, name, given[name])
    for token, value in given.get("logit_bias", {}).items():
        request.sampling.logit_bias[token] = value
    stop = given.get("stop", ())
    request.stopping.stop.extend([stop] if isinstance(stop, str) else stop)
    request.stopping.stop_token_ids.extend(given.get("stop_token_ids", ()))
    for name in _STOPPING:
        if name in given:
            setattr(request.stopping, name, given[name])
    for name in _SHARE:
        if name in given:
            setattr(request, name, given[name])


def _set_constraint(request: pb.GenerateRequest, options: Options) -> None:
    given: Mapping[str, Any] = options
    named = [name for name in _CONSTRAINTS if name in given]
    if len(named) > 1:
        raise RequestInvalid(f"give {named[0]} or {named[1]}, not both")
    for name in named:
        value = given[name]
        if name == "choice":
            request.constraint.choice.options.extend([value] if isinstance(value, str) else value)
        elif name == "json_schema" and isinstance(value, Mapping):
            request.constraint.json_schema = json.dumps(value)
        elif name in ("regex", "lark") and not isinstance(value, str):
            raise RequestInvalid(f"{name} must be text, not {type(value).__name__}")
        else:
            setattr(request.constraint, name, value)


def _set_choices(request: pb.GenerateRequest, options: Options) -> None:
    if "logprobs" in options:
        request.logprobs.top = options["logprobs"]
        request.logprobs.SetInParent()
    if "prompt_logprobs" in options:
        request.prompt_logprobs.top = options["prompt_logprobs"]
        request.prompt_logprobs.SetInParent()
    if options.get("n", 1) < 1:
        raise RequestInvalid(f"n must be 1 or more, not {options['n']}")
    request.n = options.get("n", 1)
    request.echo = options.get("echo", False)
