"""Every field of PEFT's LoraConfig and what the converter does with it, as data.

Owns the decision per field; reads no files. A field is
    honoured        its value changes the conversion (`settings` reads it)
    neutral         accepted only at a value that changes nothing, otherwise refused by its name
    informational   about training, provenance or PEFT's own runtime: never changes the answer
A field that is not listed comes from another version of PEFT: refused unless null, false or empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from remora_contract.errors import Unsupported


@dataclass(frozen=True)
class Rule:
    kind: Literal["honoured", "neutral", "informational"]
    neutral: tuple[Any, ...] = ()
    why: str = ""  # completes "…: <why>" in the refusal


def _neutral(*values: Any, why: str) -> Rule:
    return Rule("neutral", (None, *values), why)


HONOURED = Rule("honoured")
INFORMATIONAL = Rule("informational")

FIELDS: Mapping[str, Rule] = {
    "r": HONOURED,
    "lora_alpha": HONOURED,
    "use_rslora": HONOURED,
    "rank_pattern": HONOURED,
    "alpha_pattern": HONOURED,
    "target_modules": HONOURED,
    "exclude_modules": HONOURED,
    "layers_to_transform": HONOURED,
    "layers_pattern": HONOURED,
    "peft_type": _neutral("LORA", why="only LORA adapters can be carried"),
    "task_type": _neutral("CAUSAL_LM", why="only adapters of causal language models are carried"),
    "init_lora_weights": _neutral(
        True,
        False,
        "gaussian",
        "eva",
        "orthogonal",
        "mica",
        why="this initialisation also changes the base weights; save the adapter with "
        "path_initial_model_for_weight_conversion, which turns it into plain LoRA",
    ),
    "bias": _neutral("none", why="trained biases are not carried"),
    "lora_bias": _neutral(False, why="a bias on lora_B is not carried"),
    "fan_in_fan_out": _neutral(False, why="Conv1D layers are not carried"),
    "modules_to_save": _neutral([], why="whole trained modules are not carried"),
    "trainable_token_indices": _neutral([], {}, why="trained token embeddings are not carried"),
    "ensure_weight_tying": _neutral(False, why="adapters on tied embeddings are not carried"),
    "target_parameters": _neutral([], why="adapters on bare parameters are not carried"),
    "layer_replication": _neutral([], why="repeated layers are another base model"),
    "use_dora": _neutral(False, why="DoRA is not carried yet"),
    "use_qalora": _neutral(False, why="QALoRA pools the input, which is not carried"),
    "use_bdlora": _neutral(why="BD-LoRA is not carried"),
    "alora_invocation_tokens": _neutral(why="Activated LoRA is not carried"),
    "arrow_config": _neutral(why="Arrow routing is not carried"),
    "kasa_config": _neutral(why="KaSA's diagonal is not carried"),
    "monteclora_config": _neutral(why="MonteCLoRA sampling is not carried"),
    "velora_config": _neutral(why="VeLoRA is not carried"),
    "megatron_config": _neutral({}, why="Megatron's parallel layers are not carried"),
    # Read by PEFT only beside use_qalora, megatron_config or the init_lora_weights named after
    # them, and those are decided above.
    "qalora_group_size": INFORMATIONAL,
    "megatron_core": INFORMATIONAL,
    "loftq_config": INFORMATIONAL,
    "eva_config": INFORMATIONAL,
    "corda_config": INFORMATIONAL,
    "lora_ga_config": INFORMATIONAL,
    "lora_dropout": INFORMATIONAL,
    "inference_mode": INFORMATIONAL,
    "runtime_config": INFORMATIONAL,
    "base_model_name_or_path": INFORMATIONAL,
    "revision": INFORMATIONAL,
    "auto_mapping": INFORMATIONAL,
    "peft_version": INFORMATIONAL,
}

_NOTHING: tuple[Any, ...] = (None, False, "", [], {})


def check_fields(config: Mapping[str, Any], where: str) -> None:
    """Raises Unsupported naming the first field that asks for what is not carried."""
    for name in sorted(config, key=lambda name: (name != "peft_type", name)):
        rule, value = FIELDS.get(name), config[name]
        if rule is None and not _is_one_of(value, _NOTHING):
            raise Unsupported(
                f"{where}: {name} = {_shown(value)}: this version of remora-build does not know "
                "the field and carries nothing it cannot name"
            )
        if rule is not None and rule.kind == "neutral" and not _is_one_of(value, rule.neutral):
            raise Unsupported(f"{where}: {name} = {_shown(value)}: {rule.why}")


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Equality that tells 0 from False and 1 from True, as JSON does."""
    return any(type(value) is type(a) and value == a for a in allowed)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
