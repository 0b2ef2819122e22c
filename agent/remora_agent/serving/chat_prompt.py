"""A chat as its template takes it: messages as tables, tools as a variable. Pure.

Everything a caller says reaches the template as data; nothing of it is ever read as a template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from remora_agent.serving.call import ChatPrompt, Message
from remora_agent.serving.tool_calls import offers_tools, tool_plan
from remora_agent.text.tools import ToolFormat, check_tool_calls, check_tools, template_calls
from remora_contract.errors import RequestInvalid

MAX_TEMPLATE_ARGUMENTS = 16 << 10  # characters of JSON
# The renderer sets these itself; letting a caller replace them would break its promises.
RESERVED_ARGUMENTS = frozenset({"messages", "add_generation_prompt", "bos_token", "eos_token"})
_CHOICES = ("", "auto", "none", "required")


def check_template_arguments(arguments: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Returns `arguments`. Raises RequestInvalid for a variable that is the renderer's own."""
    for name in arguments:
        if not name.isidentifier() or name in RESERVED_ARGUMENTS:
            raise RequestInvalid(f"{where}: {name[:40]!r} cannot be given as a template variable")
    return arguments


def check_chat_tools(chat: ChatPrompt) -> None:
    """Raises RequestInvalid naming the field."""
    names = check_tools(chat.tools)
    if chat.tools and "tools" in chat.arguments:
        raise RequestInvalid("tools: the template's variable tools is given twice; leave one out")
    if chat.tool_choice and not chat.tools:
        raise RequestInvalid("tool_choice goes with tools; give both or neither")
    if chat.tool_choice not in (*_CHOICES, *names):
        raise RequestInvalid(
            f"tool_choice: {chat.tool_choice[:80]!r} is not auto, none, required or a tool's name"
        )
    for i, message in enumerate(chat.messages):
        _check_message(message, f"messages[{i}]")


def _check_message(message: Message, where: str) -> None:
    if message.tool_calls and message.role != "assistant":
        raise RequestInvalid(f"{where}.tool_calls: only an assistant's message has them")
    if message.tool_call_id and message.role != "tool":
        raise RequestInvalid(f"{where}.tool_call_id: only a tool's message has one")
    check_tool_calls(message.tool_calls, f"{where}.tool_calls")


def template_messages(chat: ChatPrompt, form: ToolFormat | None) -> list[dict[str, Any]]:
    """Keys that say nothing are left out: templates ask whether they exist."""
    messages = [_message(m) for m in chat.messages]
    if form is None or not form.system_tools or not offers_tools(chat):
        return messages
    tools = json.dumps([dict(tool["function"]) for tool in chat.tools], ensure_ascii=False)
    if messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": ""})
    messages[0]["tools"] = tools
    return messages


def template_arguments(chat: ChatPrompt, form: ToolFormat | None) -> Mapping[str, Any]:
    """The template's variables, `tools` among them. Raises Unsupported, RequestInvalid."""
    if tool_plan(chat, form) is None:
        return chat.arguments
    return {**chat.arguments, "tools": [dict(tool) for tool in chat.tools]}


def _message(message: Message) -> dict[str, Any]:
    made: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        made["tool_calls"] = template_calls(message.tool_calls)
    if message.tool_call_id:
        made["tool_call_id"] = message.tool_call_id
    if message.name:
        made["name"] = message.name
    return made
