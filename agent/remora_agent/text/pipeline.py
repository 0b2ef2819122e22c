"""A bundle's text side: tokenizer and chat template together, as surfaces use them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Encoded:
    """`text` is what was tokenised: the template's output for a chat."""

    text: str
    token_ids: tuple[int, ...]


class TextPipeline:
    """Thread-safe: nothing changes after `load`."""

    @classmethod
    def load(cls, bundle_directory: Path) -> TextPipeline:
        """Reads BUNDLE/tokenizer/ and BUNDLE/generation_config.json. Raises ArtifactInvalid."""
        raise NotImplementedError

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Encoded:
        """Raises RequestInvalid for text past the bound."""
        raise NotImplementedError

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        arguments: Mapping[str, Any] | None = None,
    ) -> Encoded:
        """As transformers' apply_chat_template; `arguments` are extra template variables (tools,
        documents, enable_thinking, …), already decoded. Raises RequestInvalid with the template's
        words, Refused when the bundle has no chat template."""
        raise NotImplementedError

    def decode(self, token_ids: Sequence[int], *, keep_special_tokens: bool = False) -> str:
        """Raises RequestInvalid for an id outside the vocabulary."""
        raise NotImplementedError
