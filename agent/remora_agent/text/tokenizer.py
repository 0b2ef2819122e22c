"""Text to token ids and back, as the bundle's tokenizer.json defines it. Knows no templates."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from remora_agent.text.vocabulary import bytes_of_one, token_bytes
from remora_contract.errors import ArtifactInvalid, PromptTooLong, RequestInvalid

# One text at a time is encoded: the library would start a thread for each processor in vain.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TOKENIZER_JSON = "tokenizer.json"
MAX_FILE_BYTES = 256 << 20


class TextTokenizer:
    """Thread-safe: nothing changes after construction."""

    def __init__(self, tokenizer: Any, max_text_bytes: int) -> None:
        """`tokenizer` is a tokenizers.Tokenizer. Truncation and padding stored in its file would
        change prompts silently, so both are switched off."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._max_text_bytes = max_text_bytes
        self._vocab = int(tokenizer.get_vocab_size(with_added_tokens=True))
        added = tokenizer.get_added_tokens_decoder()
        self.bytes_of_token = bytes_of_one(tokenizer)
        self._special = frozenset(i for i, token in added.items() if token.special)

    @classmethod
    def load(cls, directory: Path, max_text_bytes: int) -> TextTokenizer:
        """Reads DIRECTORY/tokenizer.json. Raises ArtifactInvalid."""
        path = directory / TOKENIZER_JSON
        text = read_bounded(path, MAX_FILE_BYTES)
        try:
            tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as e:
            raise ArtifactInvalid(f"{path} is no tokenizer this version reads: {e}") from e
        return cls(tokenizer, max_text_bytes)

    @property
    def vocab(self) -> int:
        """Ids run below this, unless the file leaves gaps."""
        return self._vocab

    def token_bytes(self, vocab: int) -> tuple[list[bytes], list[int]]:
        """As vocabulary.token_bytes."""
        return token_bytes(self._tokenizer, vocab)

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Special tokens written in `text` are recognised, as in transformers.

        Raises PromptTooLong past the bound in bytes, RequestInvalid for text that is no UTF-8.
        """
        try:
            size = len(text.encode())
        except UnicodeEncodeError as e:
            raise RequestInvalid(f"the text holds half a character at index {e.start}") from e
        if size > self._max_text_bytes:
            raise PromptTooLong(
                f"the text has {size} bytes; at most {self._max_text_bytes} are tokenised"
            )
        # `encode` would hold Python's lock, for seconds when the text is long: nothing else moves.
        found = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return tuple(found[0].ids)

    def decode(self, token_ids: Sequence[int], *, keep_special_tokens: bool = False) -> str:
        """Ids without a token give no text; a cut-off character gives U+FFFD."""
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=not keep_special_tokens
        )
        return text

    def decode_showing(self, token_ids: Sequence[int], shown: frozenset[int]) -> str:
        """As `decode`, with the texts of these special tokens."""
        ids = [i for i in token_ids if i in shown or i not in self._special]
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    @property
    def all_special_ids(self) -> frozenset[int]:
        return frozenset(self._special)

    def special_ids(self, texts: Iterable[str]) -> tuple[int, ...]:
        """The ids of those texts that are special tokens."""
        found = (self._tokenizer.token_to_id(text) for text in texts)
        return tuple(i for i in found if i in self._special)


def read_bounded(path: Path, limit: int) -> str:
    """A text file's content, its size checked before it is read. Raises ArtifactInvalid."""
    try:
        if path.stat().st_size > limit:
            raise ArtifactInvalid(f"{path} is larger than {limit} bytes")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise ArtifactInvalid(
            f"{path} does not exist; export the checkpoint again with its tokenizer files"
        ) from e
    except UnicodeDecodeError as e:
        raise ArtifactInvalid(f"{path} is not UTF-8: {e}") from e
    except OSError as e:
        raise ArtifactInvalid(f"{path} cannot be read: {e.strerror or e}") from e
