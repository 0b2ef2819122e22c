"""The tokenizer and generation settings of a checkpoint: carried verbatim, the ids that end, begin
and pad a text read out. Owns file names; changes no byte.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from remora_build.checkpoint.directory import CONFIG, GENERATION_CONFIG, read_json
from remora_build.checkpoint.safetensors_file import is_file
from remora_contract.bundle import TOKENIZER_DIR
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import CheckpointInvalid, Unsupported

TOKENIZER_JSON = "tokenizer.json"
# Carried when present; the templates directory holds the further named templates.
OPTIONAL_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)
TEMPLATES_DIR = "additional_chat_templates"
_MAX_FILE_BYTES = 256 << 20
_SHOWN, _SHOWN_CHARS = 8, 40


@dataclass(frozen=True)
class SpecialTokens:
    eos: tuple[int, ...]
    bos: int | None
    pad: int | None


def copy_tokenizer(checkpoint: Path, bundle: Path) -> list[str]:
    """Copies what there is; paths in the bundle, "/" between parts.

    Raises CheckpointInvalid for a file of absurd size.
    """
    sources = {f"{TOKENIZER_DIR}/{n}": checkpoint / n for n in (TOKENIZER_JSON, *OPTIONAL_FILES)}
    for template in sorted((checkpoint / TEMPLATES_DIR).glob("*.jinja")):
        sources[f"{TOKENIZER_DIR}/{TEMPLATES_DIR}/{template.name}"] = template
    sources[GENERATION_CONFIG] = checkpoint / GENERATION_CONFIG
    copied = []
    for path, source in sources.items():
        if is_file(source):
            _copy(source, bundle / path)
            copied.append(path)
    return copied


def _copy(source: Path, target: Path) -> None:
    _check_size(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _check_size(path: Path) -> None:
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise CheckpointInvalid(f"{path} is larger than {_MAX_FILE_BYTES} bytes")


def load_tokenizer(checkpoint: Path, spec: DecoderSpec) -> Tokenizer:
    """Raises Unsupported without a tokenizer.json, CheckpointInvalid when it cannot be read or has
    tokens the model does not; added ones may (`tokens_beyond`)."""
    path = checkpoint / TOKENIZER_JSON
    if not is_file(path):
        raise Unsupported(
            f"{checkpoint} has no {TOKENIZER_JSON}; load its tokenizer with transformers' "
            "AutoTokenizer and save_pretrained it there"
        )
    _check_size(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:
        raise CheckpointInvalid(f"{path} is no tokenizer: {e}") from e
    tokenizer.no_padding()  # some files carry the settings of their training
    tokenizer.no_truncation()
    highest = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=0)
    if highest >= spec.vocab:
        raise CheckpointInvalid(f"{path} has token {highest}; the model has {spec.vocab}")
    return tokenizer


def tokens_beyond(tokenizer: Tokenizer, vocab: int) -> tuple[str, ...]:
    """Added tokens that the model does not have, some of them if they are many: the small Gemma 3s
    carry the large ones' image token. On the device a prompt with one is refused."""
    added = tokenizer.get_added_tokens_decoder()
    found = [token.content[:_SHOWN_CHARS] for i, token in sorted(added.items()) if i >= vocab]
    more = [f"{len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return (*found[:_SHOWN], *more)


def special_tokens(checkpoint: Path, vocab: int) -> SpecialTokens:
    """From generation_config.json and config.json, or what a text_config in it says where they say
    nothing. Raises CheckpointInvalid for an alien id."""
    sources = [checkpoint / GENERATION_CONFIG, checkpoint / CONFIG]
    documents = [(str(path), read_json(path)) for path in sources if is_file(path)]
    nested = [(f"{where}: text_config", d.get("text_config")) for where, d in documents]
    texts = [(where, d) for where, d in nested if isinstance(d, dict)]

    def listed(key: str, among: list[tuple[str, dict[str, Any]]]) -> list[int]:
        return [i for where, d in among for i in _ids(d.get(key), f"{where}: {key}", vocab)]

    keys = ("eos_token_id", "bos_token_id", "pad_token_id")
    found = {key: listed(key, documents) or listed(key, texts) for key in keys}
    return SpecialTokens(
        eos=tuple(dict.fromkeys(found["eos_token_id"])),
        bos=next(iter(found["bos_token_id"]), None),
        pad=next(iter(found["pad_token_id"]), None),
    )


def _ids(value: Any, where: str, vocab: int) -> list[int]:
    """One id or several. -1 is how some checkpoints write "none"."""
    values = value if isinstance(value, list) else [value]
    ids = [v for v in values if v is not None and v != -1]
    for v in ids:
        if type(v) is not int or not 0 <= v < vocab:
            raise CheckpointInvalid(f"{where} is {v!r}, no token of a vocabulary of {vocab}")
    return ids
