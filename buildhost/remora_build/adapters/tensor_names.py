"""What each tensor of a PEFT adapter is, from its name: `base_model.model.<module>.<part>`.

Owns PEFT's spelling; knows no decoder. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from remora_contract.errors import AdapterInvalid, Unsupported

Part = Literal[
    "A", "B", "B.bias", "magnitude", "embedding_A", "embedding_B", "tokens", "bias", "weight"
]
Found = dict[str, dict[Part, str]]  # module -> its parts' tensor names

PREFIX = "base_model.model."
COMPILED = "_orig_mod."
SAVED_COMPILED = (
    "is of a model that torch.compile had wrapped before PEFT did, and PEFT loads it into such a "
    f"one only: take {COMPILED!r} out of the tensors' names, or compile after get_peft_model"
)
# By the end of the tensor's name. `bias` and `weight` are the base layer's own, `base_layer.` being
# where PEFT keeps them once the module is adapted.
_PARTS: tuple[tuple[Part, str], ...] = (
    ("A", r"\.lora_A\.weight"),
    ("B", r"\.lora_B\.weight"),
    ("B.bias", r"\.lora_B\.bias"),
    ("magnitude", r"\.lora_magnitude_vector(?:\.weight)?"),
    ("embedding_A", r"\.lora_embedding_A"),
    ("embedding_B", r"\.lora_embedding_B"),
    ("tokens", r"\.token_adapter\.trainable_tokens_delta"),
    ("bias", r"(?:\.base_layer)?\.bias"),
    ("weight", r"(?:\.base_layer)?\.weight"),
)
_NAMES = tuple((part, re.compile(rf"(.+?){end}")) for part, end in _PARTS)
# State of training methods that answer as plain LoRA when they do not train.
_TRAINING_ONLY = ("lora_velora_embed", "lora_monteclora_sampler")
_NOT_CARRIED = (
    ("lora_diag", "KaSA's diagonal; it is not carried"),
    ("modules_to_save", "a whole trained module (modules_to_save); it is not carried"),
)


def sort_tensors(names: Iterable[str]) -> Found:
    """Every tensor under its module. Raises AdapterInvalid for a name PEFT does not write and for
    two names of one tensor, Unsupported for what is known and not carried."""
    found: Found = {}
    for name in sorted(names):
        if any(f".{part}" in name for part in _TRAINING_ONLY):
            continue
        module, part = _parse(name)
        parts = found.setdefault(module, {})
        if part in parts:
            raise AdapterInvalid(f"{parts[part]} and {name} are the same tensor of {module}")
        parts[part] = name
    return found


def unbound(name: str) -> AdapterInvalid:
    """The error for a tensor that nothing takes."""
    if COMPILED in name:
        return AdapterInvalid(f"tensor {name[:200]} {SAVED_COMPILED}")
    return AdapterInvalid(
        f"tensor {name[:200]} belongs to no projection of this decoder and cannot be bound; "
        f"PEFT names them {PREFIX}<module>.lora_A.weight (and lora_B), the modules being those of "
        "the base model, for example model.layers.0.self_attn.q_proj"
    )


def _parse(name: str) -> tuple[str, Part]:
    for text, what in _NOT_CARRIED:
        if f".{text}" in name:
            raise Unsupported(f"tensor {name[:200]} is {what}")
    if not name.startswith(PREFIX):
        raise unbound(name)
    for part, pattern in _NAMES:
        match = pattern.fullmatch(name, len(PREFIX))
        if match is not None and ".lora_" not in match[1]:
            return match[1], part
    raise unbound(name)
