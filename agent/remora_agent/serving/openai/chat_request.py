"""The body of POST /v1/chat/completions: every field is carried over or refused by name. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from remora_agent.runtime.api import Scoring
from remora_agent.serving.call import ChatPrompt, GenerateCall, Message
from remora_agent.serving.chat_prompt import MAX_TEMPLATE_ARGUMENTS, check_template_arguments
from remora_agent.serving.limits import MAX_MESSAGES, check_call
from remora_agent.serving.openai.errors import FieldInvalid, FieldUnsupported
from remora_agent.serving.openai.fields import Fields, Refusals
from remora_agent.serving.openai.options import (
    MAX_TOP_LOGPROBS,
    CommonOptions,
    common_options,
)

_UNSUPPORTED: Refusals = {
    "audio": ((), "answers are text"),
    "modalities": ((["text"],), "answers are text"),
    "function_call": (("none",), "say tool_choice"),
    "functions": (([],), "say tools"),
    "reasoning_effort": ((), "say chat_template_kwargs, if the model's template has such a switch"),
    "verbosity": (("medium",), "there is no such control"),
    "web_search_options": ((), "there is no web search"),
    "chat_template": ((), "the template is the bundle's"),
    "continue_final_message": ((False,), "the template ends each message"),
    "add_special_tokens": ((False,), "the template writes its own special tokens"),
    "documents": (([],), "say chat_template_kwargs, if the model's template takes documents"),
    "echo": ((False,), "only /v1/completions repeats its prompt"),
    "include_reasoning": ((True,), "reasoning is part of the content"),
}
_MESSAGE_UNSUPPORTED: Refusals = {
    "refusal": (("",), "there are no refusals"),
    "audio": ((), "messages are text"),
    "annotations": (([],), "there are no annotations"),
    "function_call": ((), "say tool_calls"),
}
_ROLES = {"developer": "system"}


@dataclass(frozen=True)
class ChatRequest:
    options: CommonOptions
    calls: tuple[GenerateCall, ...]  # one for each answer, adapters not settled yet


def chat_request(body: Mapping[str, Any]) -> ChatRequest:
    """Raises FieldInvalid, FieldUnsupported, and what `limits.check_call` raises."""
    fields = Fields(body)
    options = common_options(fields)
    prompt = chat_prompt(fields)
    scoring = _scoring(fields)
    fields.refuse(_UNSUPPORTED)
    fields.done()
    calls = tuple(
        GenerateCall(
            prompt=prompt,
            sampling=options.seeded(i),
            stopping=options.stopping,
            constraint=options.constraint,
            scoring=scoring,
            share=options.share,
            session=options.session,
        )
        for i in range(options.n)
    )
    check_call(calls[0])
    return ChatRequest(options, calls)


def chat_prompt(fields: Fields) -> ChatPrompt:
    """Of the fields that say what the template gets; /tokenize shares it."""
    messages = fields.items("messages")
    if not messages or len(messages) > MAX_MESSAGES:
        raise FieldInvalid(f"messages: give 1 to {MAX_MESSAGES} messages", "messages")
    tools = fields.items("tools") or []
    arguments = fields.table("chat_template_kwargs") or {}
    if len(json.dumps(arguments)) > MAX_TEMPLATE_ARGUMENTS:
        raise FieldInvalid(
            f"chat_template_kwargs: at most {MAX_TEMPLATE_ARGUMENTS} characters of JSON",
            "chat_template_kwargs",
        )
    check_template_arguments(arguments, "chat_template_kwargs")
    add = fields.flag("add_generation_prompt")
    parallel = fields.flag("parallel_tool_calls")
    choice = _tool_choice(fields)
    if not all(isinstance(tool, dict) for tool in tools):
        raise FieldInvalid("tools must be a list of objects", "tools")
    return ChatPrompt(
        messages=tuple(_message(m, f"messages[{i}]") for i, m in enumerate(messages)),
        add_generation_prompt=True if add is None else add,
        arguments=arguments,
        tools=tuple(tools),
        tool_choice=choice if tools or choice != "none" else "",
        parallel_tool_calls=True if parallel is None else parallel,
    )


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise FieldInvalid(f"{where} must be an object", where)
    fields = Fields(value, where)
    role = fields.text("role") or ""
    content = _content(fields)
    calls = fields.items("tool_calls") or []
    if not all(isinstance(call, dict) for call in calls):
        raise FieldInvalid(f"{where}.tool_calls must be a list of objects", f"{where}.tool_calls")
    if content is None and not calls and role != "assistant":
        raise FieldInvalid(f"{where}.content must be text", f"{where}.content")
    made = Message(
        role=_ROLES.get(role, role),
        content=content or "",
        tool_calls=tuple(calls),
        tool_call_id=fields.text("tool_call_id") or "",
        name=fields.text("name") or "",
    )
    fields.refuse(_MESSAGE_UNSUPPORTED)
    fields.done()
    return made


def _content(fields: Fields) -> str | None:
    """Text, or a list of text parts, which become lines."""
    value = fields.take("content")
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise fields.wrong("content", "text or a list of parts", value)
    return "\n".join(_part(p, f"{fields.path('content')}[{i}]") for i, p in enumerate(value))


def _part(value: dict[str, Any], where: str) -> str:
    part = Fields(value, where)
    kind, text = part.text("type"), part.text("text")
    if kind != "text" or text is None:
        raise FieldUnsupported(
            f"{where}: parts of type {str(kind)[:40]!r} are not supported; send text", where
        )
    part.done()
    return text


def _tool_choice(fields: Fields) -> str:
    """A mode, or the name of the one function to call."""
    value = fields.take("tool_choice")
    if value is None:
        return ""
    if isinstance(value, str) and value in ("auto", "none", "required"):
        return value
    if not isinstance(value, dict):
        raise fields.wrong("tool_choice", "auto, none, required or a function", value)
    choice = Fields(value, "tool_choice")
    kind = choice.text("type")
    if kind != "function":
        raise FieldUnsupported(
            f"tool_choice.type {str(kind)[:40]!r} is not supported; name a function", "tool_choice"
        )
    function = Fields(choice.table("function") or {}, "tool_choice.function")
    name = function.text("name")
    if not name or name in ("auto", "none", "required"):
        raise function.wrong("name", "the name of a tool", name)
    function.done()
    choice.done()
    return name


def _scoring(fields: Fields) -> Scoring:
    wanted = fields.flag("logprobs") or False
    top = fields.whole("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top and not wanted:
        raise FieldInvalid("top_logprobs goes with logprobs: true", "top_logprobs")
    return Scoring(top=(top or 0) if wanted else None)
