"""Which token sequences are recorded: built-in sentences, or lines of a --golden file. Pure but for
reading that file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from remora_contract.errors import DocumentInvalid, RequestInvalid
from remora_contract.strict import loads

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and then",
    "Check the pressure of pump 7. If it is above 3.5 bar,",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Überraschung: 東京の天気は晴れ, 23 °C,",
)
BUILTIN_TOKENS = 24  # a tokenizer that splits a sentence finer only sees its start
MAX_TOKENS = 512  # a prompt; the whole batch is padded to the longest
MAX_PROMPTS = 64
_MAX_FILE_BYTES = 4 << 20


@dataclass(frozen=True)
class Prompt:
    tokens: tuple[int, ...]
    text: str | None = None


@dataclass(frozen=True)
class _Line:
    text: str | None = None
    tokens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.tokens is None):
            raise ValueError('needs exactly one of "text" and "tokens"')


def builtin_prompts(tokenizer: Tokenizer, context: int) -> tuple[Prompt, ...]:
    """Sentences through the bundle's own tokenizer, cut short; a cut one carries no text.

    Raises RequestInvalid when the tokenizer makes nothing of any of them.
    """
    prompts = [_encoded(tokenizer, text, min(context, BUILTIN_TOKENS)) for text in SENTENCES]
    told = tuple(p for p in prompts if p.tokens)
    if not told:
        raise RequestInvalid(
            "the tokenizer makes no tokens of the built-in prompts; "
            "give prompts of your own with --golden FILE"
        )
    return told


def _encoded(tokenizer: Tokenizer, text: str, most: int) -> Prompt:
    tokens = tuple(tokenizer.encode(text).ids)
    return Prompt(tokens, text) if len(tokens) <= most else Prompt(tokens[:most])


def read_prompts(path: Path, tokenizer: Tokenizer, context: int, vocab: int) -> tuple[Prompt, ...]:
    """One JSON object a line, {"text": ...} or {"tokens": [...]}.

    Raises DocumentInvalid for a malformed file, RequestInvalid for a prompt the graph cannot read.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise DocumentInvalid(f"{path}: larger than {_MAX_FILE_BYTES} bytes")
        lines = [text for text in path.read_text("utf-8").splitlines() if text.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise DocumentInvalid(f"{path} cannot be read: {e}") from e
    if not 1 <= len(lines) <= MAX_PROMPTS:
        raise DocumentInvalid(f"{path}: has {len(lines)} prompts; give 1 to {MAX_PROMPTS}")
    prompts = []
    for number, text in enumerate(lines, start=1):
        where = f"{path}: line {number}"
        line = loads(_Line, text, where)
        prompts.append(_prompt(line, where, tokenizer, context, vocab))
    return tuple(prompts)


def _prompt(line: _Line, where: str, tokenizer: Tokenizer, context: int, vocab: int) -> Prompt:
    tokens = line.tokens
    if tokens is None:
        tokens = tuple(tokenizer.encode(line.text).ids)
    most = min(context, MAX_TOKENS)
    if not 1 <= len(tokens) <= most:
        raise RequestInvalid(f"{where}: {len(tokens)} tokens; give 1 to {most}")
    alien = [t for t in tokens if not 0 <= t < vocab]
    if alien:
        raise RequestInvalid(f"{where}: token {alien[0]} is not in the vocabulary of {vocab}")
    return Prompt(tokens, line.text)
