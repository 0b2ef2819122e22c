"""Which modules and parameters an adapter's config adapts or trains as a whole: PEFT's rules. Pure.

Module paths are those of the model in memory.
"""

from __future__ import annotations

from remora_build.adapters.matching import selects
from remora_build.merge.settings import MergeSettings

# Last parts of module paths: what all-linear leaves out, and what PEFT saves beside an adapter
# (save_embedding_layers) although it was not trained.
INPUT_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")
HEADS = ("lm_head", "embed_out")
_OTHER_EMBEDDINGS = ("wpe", "embed_positions")


def last_part(module: str) -> str:
    return module.rpartition(".")[2]


def is_embedding_or_head(module: str) -> bool:
    return last_part(module) in (*INPUT_EMBEDDINGS, *HEADS)


def selects_module(settings: MergeSettings, module: str) -> bool:
    """Does target_modules, less the exclusions, name this module?"""
    linear = not is_embedding_or_head(module) and last_part(module) not in _OTHER_EMBEDDINGS
    return selects(settings.lora, module, linear=linear)


def saved_as_whole(settings: MergeSettings, module: str) -> bool:
    """Is this module, or one around it, among modules_to_save? PEFT compares the path's end, not
    whole parts of it: `norm` is `input_layernorm` too."""
    parts = module.split(".")
    around = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return any(path.endswith(name) for path in around for name in settings.modules_to_save)


def token_rows(settings: MergeSettings, module: str) -> tuple[int, ...] | None:
    """The vocabulary rows that the module's trained rows stand for."""
    for name, rows in settings.lora.tokens:
        if trains(name, module):
            return rows
    return None


def trains(name: str, module: str) -> bool:
    """Whether trainable_token_indices means the module by this name; "" is the embedding."""
    return module.endswith(name) and (bool(name) or last_part(module) in INPUT_EMBEDDINGS)
