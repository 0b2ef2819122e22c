"""Every field of PEFT's LoraConfig and what merging does with it, as data.

Owns the decision per field; reads no files. The kinds are those of `adapters.fields`: honoured,
neutral (accepted only at a value that changes nothing), informational. Merging honours more than
the runtime bank can, because it may write any weight; what PEFT itself cannot merge is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from remora_build.adapters.fields import PLAIN_INITS
from remora_build.adapters.rules import Rule, accepted, check, honoured, refused

FIELDS: Mapping[str, Rule] = {
    "r": honoured("The rank: every tensor must have it, or the one that rank_pattern says."),
    "lora_alpha": honoured("The scaling is alpha / r."),
    "use_rslora": honoured("The scaling is alpha / sqrt(r)."),
    "rank_pattern": honoured(
        "The first pattern that matches the end of a module's path, at a dot, gives its rank."
    ),
    "alpha_pattern": honoured("The same for alpha."),
    "target_modules": honoured(
        "A list of suffixes or full paths, a regular expression or all-linear; embedding and head "
        "too."
    ),
    "exclude_modules": honoured("A list of suffixes or full paths, or a regular expression."),
    "layers_to_transform": honoured(
        "Only these layers, beside a list; a full path overrules it, as in PEFT."
    ),
    "layers_pattern": honoured("The name of the list of layers that layers_to_transform counts."),
    "target_parameters": honoured(
        "Stacked experts, also where the checkpoint stores them one by one, and single weights."
    ),
    "bias": honoured("The trained biases replace the checkpoint's."),
    "lora_bias": honoured("Added to the layer's bias; refused where there is none."),
    "use_dora": honoured(
        "The weight is normalised and multiplied by the magnitudes; alone and with weight 1 only."
    ),
    "modules_to_save": honoured("Replace the checkpoint's tensors."),
    "trainable_token_indices": honoured("The trained rows replace the checkpoint's."),
    "ensure_weight_tying": honoured("Head and embedding are changed alike."),
    "fan_in_fan_out": accepted(
        "PEFT overrules it by the kind of the layer, and so does this: true for Conv1D."
    ),
    "peft_type": refused("LORA", text="only LORA adapters can be merged"),
    "task_type": refused("CAUSAL_LM", text="only adapters of causal language models are merged"),
    "init_lora_weights": refused(
        True,
        False,
        *PLAIN_INITS,
        text="this initialisation also changed the base weights, so the adapter does not fit the "
        "original checkpoint; save it with path_initial_model_for_weight_conversion, which turns "
        "it into plain LoRA",
    ),
    "use_qalora": refused(False, text="QALoRA pools the input, so it has no weight to add"),
    "use_bdlora": refused(text="BD-LoRA's block-diagonal factors are not merged"),
    "alora_invocation_tokens": refused(
        text="Activated LoRA acts only after its invocation tokens: no single weight does that, so "
        "PEFT cannot merge it either; carry it with remora-build adapter"
    ),
    "arrow_config": refused(text="Arrow routes token by token: no single weight does that"),
    "kasa_config": refused(text="KaSA also truncates the base weights; merge it with PEFT"),
    "layer_replication": refused([], text="repeated layers are another base model"),
    "megatron_config": refused({}, text="Megatron's parallel layers are not merged"),
    "velora_config": accepted("Changes the backward pass only."),
    "monteclora_config": accepted("Samples during training only."),
    "qalora_group_size": accepted("Read only beside use_qalora."),
    "megatron_core": accepted("Read only beside megatron_config."),
    "loftq_config": accepted("Read only beside init_lora_weights."),
    "eva_config": accepted("Read only when the adapter is initialised."),
    "corda_config": accepted("Read only when the adapter is initialised."),
    "lora_ga_config": accepted("Read only when the adapter is initialised."),
    "lora_dropout": accepted("Drops during training only."),
    "inference_mode": accepted("Says whether PEFT would train it."),
    "runtime_config": accepted("PEFT's own memory placement."),
    "base_model_name_or_path": accepted("Shown to people; the base is CHECKPOINT."),
    "revision": accepted("Of the base, for people."),
    "auto_mapping": accepted("Which class PEFT would load."),
    "peft_version": accepted("Who wrote it."),
}


def check_fields(config: Mapping[str, Any], where: str) -> None:
    """Raises Unsupported naming the first field that asks for what cannot be merged."""
    check(config, FIELDS, where, "merges")
