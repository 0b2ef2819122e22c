"""Chat templates, rendered exactly as transformers' apply_chat_template renders them, with bounded
output. Knows nothing of tokens or files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2

from remora_agent.text.sandbox import template_environment
from remora_contract.errors import ArtifactInvalid, RequestInvalid

DEFAULT = "default"
_WITH_TOOLS = "tool_use"
_OF_THE_REQUEST = frozenset({"messages", "add_generation_prompt"})
_REASONING = ("reasoning_content", "thinking", "reasoning")
# What a template may stumble over in a caller's messages, besides its own raise_exception.
_STUMBLES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)


class ChatTemplate:
    """A bundle's template, or several by name ("default", "tool_use"). Thread-safe."""

    def __init__(
        self,
        templates: Mapping[str, str],
        special_tokens: Mapping[str, str],
        max_output_chars: int,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`special_tokens` become template variables (bos_token, eos_token, …). Raises
        ArtifactInvalid for a template that is not jinja."""
        environment = template_environment(now, max_output_chars)
        self._special_tokens = dict(special_tokens)
        self._max_output_chars = max_output_chars
        self._templates = {n: _compile(environment, n, s) for n, s in templates.items()}
        self.tool_source = templates.get(_WITH_TOOLS, templates.get(DEFAULT, ""))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The text to tokenise, without adding special tokens.

        `arguments` are further template variables in JSON's types, `tools` and `documents` among
        them. Raises RequestInvalid with the template's words, or when the output passes the bound.
        """
        arguments = dict(arguments or {})
        if clash := _OF_THE_REQUEST & set(arguments):
            raise RequestInvalid(f"template argument {min(clash)!r} is a field of the request")
        variables = {
            **self._special_tokens,
            "tools": None,
            "documents": None,
            **arguments,
            "messages": [_with_reasoning(m) for m in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        template = self._choose(with_tools=variables["tools"] is not None)
        try:
            return self._generate(template, variables)
        except _STUMBLES as e:
            raise RequestInvalid(f"the chat template refuses this: {str(e)[:500]}") from e

    def _choose(self, *, with_tools: bool) -> jinja2.Template:
        if with_tools and _WITH_TOOLS in self._templates:
            return self._templates[_WITH_TOOLS]
        if DEFAULT not in self._templates:
            known = ", ".join(sorted(self._templates))
            raise RequestInvalid(f"the bundle has no default chat template (it has: {known})")
        return self._templates[DEFAULT]

    def _generate(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        parts, size = [], 0
        for part in template.generate(**variables):
            size += len(part)
            if size > self._max_output_chars:
                raise RequestInvalid(
                    f"the rendered chat is longer than {self._max_output_chars} characters"
                )
            parts.append(part)
        return "".join(parts)


def _compile(environment: jinja2.Environment, name: str, source: str) -> jinja2.Template:
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as e:
        raise ArtifactInvalid(f"chat template {name!r}, line {e.lineno}: {e}") from e


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which templates find the reasoning under both names they look for."""
    reasoning = next((message[k] for k in _REASONING if message.get(k) is not None), None)
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}
