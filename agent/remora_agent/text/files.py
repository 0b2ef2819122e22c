"""What a bundle's tokenizer/ directory says beside tokenizer.json: chat templates and special
tokens, in the places transformers has used over time. Reads; renders and tokenises nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from remora_agent.text.chat import DEFAULT
from remora_agent.text.tokenizer import read_bounded
from remora_contract.errors import ArtifactInvalid

TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
MAX_CONFIG_BYTES = 64 << 20
MAX_TEMPLATE_BYTES = 1 << 20
MAX_TEMPLATES = 64


def read_json_table(path: Path) -> dict[str, Any]:
    """A JSON object, {} when the file does not exist. Raises ArtifactInvalid."""
    if not path.exists():
        return {}
    try:
        data = json.loads(read_bounded(path, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as e:
        raise ArtifactInvalid(f"{path} is not valid JSON: {e}") from e
    if not isinstance(data, dict):
        raise ArtifactInvalid(f"{path} must hold a table")
    return data


def chat_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Templates by name; {} when there are none. Files win over tokenizer_config.json."""
    templates = _from_config(directory, config.get("chat_template"))
    path = directory / TEMPLATE_FILE
    if path.exists():
        templates[DEFAULT] = read_bounded(path, MAX_TEMPLATE_BYTES)
    more = sorted((directory / MORE_TEMPLATES).glob("*.jinja"))
    if len(more) > MAX_TEMPLATES:
        raise ArtifactInvalid(f"{directory / MORE_TEMPLATES} holds more than {MAX_TEMPLATES} files")
    templates.update({p.stem: read_bounded(p, MAX_TEMPLATE_BYTES) for p in more})
    return templates


def special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and whatever else ends so, as templates use them."""
    extra = config.get("extra_special_tokens")
    named = {k: v for k, v in config.items() if k.endswith("_token")}
    named |= extra if isinstance(extra, dict) else {}
    found = {name: _content(value) for name, value in named.items()}
    return {name: text for name, text in found.items() if text is not None}


def _from_config(directory: Path, value: object) -> dict[str, str]:
    """Null, one template, or a list of {"name", "template"}."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list) and all(_is_named(v) for v in value):
        return {v["name"]: v["template"] for v in value}
    raise ArtifactInvalid(
        f"{directory / TOKENIZER_CONFIG}: chat_template must be text or a list of names and texts"
    )


def _is_named(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("name", "template")
    )


def _content(value: object) -> str | None:
    """A token is written as text or as a table with its text in `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
