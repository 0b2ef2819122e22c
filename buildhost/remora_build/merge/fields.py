"""Every field of PEFT's LoraConfig and what merging does with it, as data.

Owns the decision per field; reads no files. The kinds are those of `adapters.fields`: honoured,
neutral (accepted only at a value that changes nothing), informational. Merging honours more than
the runtime bank can, because it may write any weight; what PEFT itself cannot merge is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

from remora_build.adapters import fields
from remora_build.adapters.rules import Rule, Rules, accepted, honoured, refused

# What carrying does with them, merging does too.
_ALIKE = (
    *("r", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("exclude_modules", "layers_to_transform", "layers_pattern"),
    *("velora_config", "monteclora_config", "qalora_group_size", "megatron_core", "loftq_config"),
    *("eva_config", "corda_config", "lora_ga_config", "lora_dropout", "inference_mode"),
    *("runtime_config", "revision", "auto_mapping", "peft_version"),
)

FIELDS: Mapping[str, Rule] = {
    **{name: fields.FIELDS[name] for name in _ALIKE},
    "lora_alpha": honoured("The scaling is alpha / r."),
    "target_modules": honoured(
        "A list of suffixes or full paths, a regular expression or all-linear; embedding and head "
        "too."
    ),
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
        *fields.PLAIN_INITS,
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
    "base_model_name_or_path": accepted("Shown to people; the base is CHECKPOINT."),
}

MERGED = Rules("merges", FIELDS)
