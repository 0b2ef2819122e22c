"""A bundle's text side: tokenizer and chat template together, as surfaces use them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from remora_agent.text.chat import ChatTemplate
from remora_agent.text.detokenize import Detokenizer
from remora_agent.text.files import (
    TOKENIZER_CONFIG,
    chat_templates,
    read_json_table,
    special_tokens,
)
from remora_agent.text.tokenizer import TextTokenizer
from remora_contract.bundle import TOKENIZER_DIR
from remora_contract.errors import Refused, RequestInvalid

MAX_TEXT_BYTES = 4 << 20
MAX_MESSAGES = 4096


@dataclass(frozen=True)
class Encoded:
    """`text` is what was tokenised: the template's output for a chat."""

    text: str
    token_ids: tuple[int, ...]


class TextPipeline:
    """Thread-safe: nothing changes after construction."""

    def __init__(self, tokenizer: TextTokenizer, chat: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self._chat = chat

    @classmethod
    def load(
        cls,
        bundle_directory: Path,
        *,
        max_text_bytes: int = MAX_TEXT_BYTES,
        now: Callable[[], datetime] = datetime.now,
    ) -> TextPipeline:
        """Reads BUNDLE/tokenizer/. `now` serves templates that print a date. Raises
        ArtifactInvalid."""
        directory = bundle_directory / TOKENIZER_DIR
        config = read_json_table(directory / TOKENIZER_CONFIG)
        templates = chat_templates(directory, config)
        tokenizer = TextTokenizer.load(directory, max_text_bytes)
        if not templates:
            return cls(tokenizer, None)
        return cls(tokenizer, ChatTemplate(templates, special_tokens(config), max_text_bytes, now))

    @property
    def has_chat_template(self) -> bool:
        return self._chat is not None

    @property
    def vocab(self) -> int:
        """Token ids the tokenizer knows; the model's own vocabulary may be padded beyond."""
        return self._tokenizer.vocab

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Encoded:
        """Raises PromptTooLong for text past the bound, RequestInvalid for broken text."""
        return Encoded(text, self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

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
        if self._chat is None:
            raise Refused("the bundle has no chat template; send text or token ids instead")
        if not 0 < len(messages) <= MAX_MESSAGES:
            raise RequestInvalid(f"a chat has 1 to {MAX_MESSAGES} messages, not {len(messages)}")
        text = self._chat.render(
            messages, add_generation_prompt=add_generation_prompt, arguments=arguments
        )
        return self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], *, keep_special_tokens: bool = False) -> str:
        """The ids' text, special tokens left out unless asked for. Raises RequestInvalid for an
        id that cannot be one."""
        if not all(0 <= i < 1 << 32 for i in token_ids):
            raise RequestInvalid("token ids run from 0 to 4294967295")
        return self._tokenizer.decode(token_ids, keep_special_tokens=keep_special_tokens)

    def token_bytes(self, vocab: int) -> tuple[list[bytes], list[int]]:
        """The bytes of each token below `vocab`, and the ids of special tokens. Takes long for a
        large vocabulary. Raises Unsupported for tokenizers of a rare kind."""
        return self._tokenizer.token_bytes(vocab)

    def detokenizer(self, prompt: Sequence[int], visible: Sequence[int] = ()) -> Detokenizer:
        """For one answer to `prompt`; `visible` are special tokens whose text it shows."""
        if not visible:
            return Detokenizer(self._tokenizer.decode, prompt)
        shown = frozenset(visible)
        return Detokenizer(lambda ids: self._tokenizer.decode_showing(ids, shown), prompt)

    def bytes_of_token(self, token_id: int) -> bytes:
        """What the token alone stands for; may be part of a character. b"" for no token's id."""
        return self._tokenizer.bytes_of_token(token_id)

    def is_special(self, token_id: int) -> bool:
        """Whether answers leave the token's text out."""
        return self._tokenizer.is_special(token_id)

    def special_ids(self, texts: Iterable[str]) -> tuple[int, ...]:
        """Those of the texts that are special tokens, which answers do not show by themselves."""
        return self._tokenizer.special_ids(texts)

    @property
    def all_special_ids(self) -> frozenset[int]:
        return self._tokenizer.all_special_ids

    @property
    def tool_template(self) -> str:
        """The source of the template that a chat with tools goes through; empty without one."""
        return self._chat.tool_source if self._chat is not None else ""
