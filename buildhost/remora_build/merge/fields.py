"""Every field of PEFT's LoraConfig and what merging does with it, as data.

Owns the decision per field; reads no files. The kinds are those of `adapters.fields`: honoured,
neutral (accepted only at a value that changes nothing), informational. Merging honours more than
the runtime bank can, because it may write any weight; what PEFT itself cannot merge is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from remora_build.adapters.fields import PLAIN_INITS, Rule
from remora_contract.errors import Unsupported


def _honoured(text: str) -> Rule:
    return Rule("honoured", text)


def _refused(*accepted: Any, text: str) -> Rule:
    return Rule("neutral", text, (None, *accepted))


def _accepted(text: str) -> Rule:
    return Rule("informational", text)


FIELDS: Mapping[str, Rule] = {
    "r": _honoured("The rank: every tensor must have it, or the one that rank_pattern says."),
    "lora_alpha": _honoured("The scaling is alpha / r."),
    "use_rslora": _honoured("The scaling is alpha / sqrt(r)."),
    "rank_pattern": _honoured(
        "The first pattern that matches the end of a module's path, at a dot, gives its rank."
    ),
    "alpha_pattern": _honoured("The same for alpha."),
    "target_modules": _honoured(
        "A list of suffixes or full paths, a regular expression or all-linear; embedding and head "
        "too."
    ),
    "exclude_modules": _honoured("A list of suffixes or full paths, or a regular expression."),
    "layers_to_transform": _honoured(
        "Only these layers, beside a list; a full path overrules it, as in PEFT."
    ),
    "layers_pattern": _honoured("The name of the list of layers that layers_to_transform counts."),
    "target_parameters": _honoured(
        "Stacked experts, also where the checkpoint stores them one by one, and single weights."
    ),
    "bias": _honoured("The trained biases replace the checkpoint's."),
    "lora_bias": _honoured("Added to the layer's bias; refused where there is none."),
    "use_dora": _honoured(
        "The weight is normalised and multiplied by the magnitudes; alone and with weight 1 only."
    ),
    "modules_to_save": _honoured("Replace the checkpoint's tensors."),
    "trainable_token_indices": _honoured("The trained rows replace the checkpoint's."),
    "ensure_weight_tying": _honoured("Head and embedding are changed alike."),
    "fan_in_fan_out": _accepted(
        "PEFT overrules it by the kind of the layer, and so does this: true for Conv1D."
    ),
    "peft_type": _refused("LORA", text="only LORA adapters can be merged"),
    "task_type": _refused("CAUSAL_LM", text="only adapters of causal language models are merged"),
    "init_lora_weights": _refused(
        True,
        False,
        *PLAIN_INITS,
        text="this initialisation also changed the base weights, so the adapter does not fit the "
        "original checkpoint; save it with path_initial_model_for_weight_conversion, which turns "
        "it into plain LoRA",
    ),
    "use_qalora": _refused(False, text="QALoRA pools the input, so it has no weight to add"),
    "use_bdlora": _refused(text="BD-LoRA's block-diagonal factors are not merged"),
    "alora_invocation_tokens": _refused(
        text="Activated LoRA acts only after its invocation tokens: no single weight does that, so "
        "PEFT cannot merge it either; carry it with remora-build adapter"
    ),
    "arrow_config": _refused(text="Arrow routes token by token: no single weight does that"),
    "kasa_config": _refused(text="KaSA also truncates the base weights; merge it with PEFT"),
    "layer_replication": _refused([], text="repeated layers are another base model"),
    "megatron_config": _refused({}, text="Megatron's parallel layers are not merged"),
    "velora_config": _accepted("Changes the backward pass only."),
    "monteclora_config": _accepted("Samples during training only."),
    "qalora_group_size": _accepted("Read only beside use_qalora."),
    "megatron_core": _accepted("Read only beside megatron_config."),
    "loftq_config": _accepted("Read only beside init_lora_weights."),
    "eva_config": _accepted("Read only when the adapter is initialised."),
    "corda_config": _accepted("Read only when the adapter is initialised."),
    "lora_ga_config": _accepted("Read only when the adapter is initialised."),
    "lora_dropout": _accepted("Drops during training only."),
    "inference_mode": _accepted("Says whether PEFT would train it."),
    "runtime_config": _accepted("PEFT's own memory placement."),
    "base_model_name_or_path": _accepted("Shown to people; the base is CHECKPOINT."),
    "revision": _accepted("Of the base, for people."),
    "auto_mapping": _accepted("Which class PEFT would load."),
    "peft_version": _accepted("Who wrote it."),
}

_NOTHING: tuple[Any, ...] = (None, False, "", [], {})


def check_fields(config: Mapping[str, Any], where: str) -> None:
    """Raises Unsupported naming the first field that asks for what cannot be merged."""
    for name in sorted(config, key=lambda name: (name != "peft_type", name)):
        rule, value = FIELDS.get(name), config[name]
        if rule is None and not _is_one_of(value, _NOTHING):
            raise Unsupported(
                f"{where}: {name} = {_shown(value)}: this version of remora-build does not know "
                "the field and merges nothing it cannot name"
            )
        if rule is not None and rule.kind == "neutral" and not _is_one_of(value, rule.neutral):
            raise Unsupported(f"{where}: {name} = {_shown(value)}: {rule.text}")


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Equality that tells 0 from False and 1 from True, as JSON does."""
    return any(type(value) is type(a) and value == a for a in allowed)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
