"""Every field of PEFT's LoraConfig and what the converter does with it, as data.

Owns the decision per field; reads no files. A field is
    honoured        its value changes the conversion (`settings` reads it)
    neutral         accepted only at a value that changes nothing, otherwise refused by its name
    informational   about training, provenance or PEFT's own runtime: never changes the answer
A field that is not listed comes from another version of PEFT: refused unless null, false or empty.
The table in the documentation is made of `FIELDS`; a `text` is one plain sentence, and of a neutral
field it is the reason of the refusal.
"""

from __future__ import annotations

from collections.abc import Mapping

from remora_build.adapters.rules import Rule, Rules, accepted, honoured, refused

MERGE = "merge it into a checkpoint with `remora-build merge` and export that"


FIELDS: Mapping[str, Rule] = {
    "r": honoured("The rank: every tensor must have it, or the one that rank_pattern says."),
    "lora_alpha": honoured("The scaling alpha / r is multiplied into B."),
    "use_rslora": honoured("The scaling is alpha / sqrt(r)."),
    "rank_pattern": honoured(
        "The first pattern that matches the end of a module's path, at a dot, gives its rank."
    ),
    "alpha_pattern": honoured("The same for alpha."),
    "target_modules": honoured(
        "A list of suffixes or full paths, a regular expression or all-linear; "
        "embed_tokens and lm_head need a bundle exported with --adapt embed or head."
    ),
    "exclude_modules": honoured("A list of suffixes or full paths, or a regular expression."),
    "layers_to_transform": honoured(
        "Only these layers, beside a list; a full path overrules it, as in PEFT."
    ),
    "layers_pattern": honoured("The name of the list of layers that layers_to_transform counts."),
    "target_parameters": honoured(
        "The experts' stacked weights need a bundle exported with --adapt experts; "
        "a module's own weight is adapted as the module is."
    ),
    "use_dora": honoured(
        "The magnitudes are divided by the norms of the adapted weights; the bundle must be "
        "exported with --dora, and such an adapter answers alone and with weight 1."
    ),
    "bias": honoured(
        "Trained biases are carried as differences from the base's; the bundle must be exported "
        "with --adapter-bias."
    ),
    "lora_bias": honoured(
        "The bias of B times the scaling is added to the outputs; the bundle must be exported with "
        "--adapter-bias."
    ),
    "trainable_token_indices": honoured(
        "Each trained token becomes one rank of the embedding, and of a tied head; the bundle must "
        "be exported with --adapt embed, and head."
    ),
    "ensure_weight_tying": honoured(
        "An adapter on the embedding also answers for a tied head, as PEFT ties them."
    ),
    "alora_invocation_tokens": honoured(
        "The adapter is active from the last occurrence of these tokens in the prompt on, and not "
        "at all without one."
    ),
    "init_lora_weights": honoured(
        "Of pissa, olora, corda and lora_ga, which change the base: saved with "
        "path_initial_model_for_weight_conversion the adapter is plain LoRA, else its initial "
        "state is given with --initial; loftq is refused."
    ),
    "peft_type": refused("LORA", text="only LORA adapters can be carried"),
    "task_type": refused("CAUSAL_LM", text="only adapters of causal language models are carried"),
    "modules_to_save": refused([], text=f"whole trained modules are not low-rank changes; {MERGE}"),
    "layer_replication": refused(
        [], text="repeated layers are another base model; export a checkpoint that has them"
    ),
    "use_qalora": refused(False, text="QALoRA pools the input, which no bank does"),
    "use_bdlora": refused(text="BD-LoRA's block-diagonal factors are not carried"),
    "arrow_config": refused(text="Arrow chooses adapters for each token, which no bank does"),
    "kasa_config": refused(
        text="KaSA takes singular components out of the base weights, which the bundle still has"
    ),
    "megatron_config": refused({}, text="Megatron's parallel layers are not carried"),
    "fan_in_fan_out": accepted(
        "PEFT itself resets it for linear layers, and every supported decoder has only those."
    ),
    "velora_config": accepted("Changes the backward pass only."),
    "monteclora_config": accepted("Samples during training only."),
    # Read by PEFT only beside use_qalora, megatron_config or the init_lora_weights named after
    # them, and those are decided above.
    "qalora_group_size": accepted("Read only beside use_qalora."),
    "megatron_core": accepted("Read only beside megatron_config."),
    "loftq_config": accepted("Read only beside init_lora_weights."),
    "eva_config": accepted("Read only when the adapter is initialised."),
    "corda_config": accepted("Read only when the adapter is initialised."),
    "lora_ga_config": accepted("Read only when the adapter is initialised."),
    "lora_dropout": accepted("Drops during training only."),
    "inference_mode": accepted("Says whether PEFT would train it."),
    "runtime_config": accepted("PEFT's own memory placement."),
    "base_model_name_or_path": accepted("Shown to people; the base is the bundle's."),
    "revision": accepted("Of the base, for people."),
    "auto_mapping": accepted("Which class PEFT would load."),
    "peft_version": accepted("Who wrote it."),
}

# The initialisations that leave the base as it is, beside true and false.
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")

CARRIED = Rules("carries", FIELDS)
