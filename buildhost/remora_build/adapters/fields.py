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

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from remora_contract.errors import Unsupported

MERGE = "merge it into a checkpoint with `remora-build merge` and export that"


@dataclass(frozen=True)
class Rule:
    kind: Literal["honoured", "neutral", "informational"]
    text: str
    neutral: tuple[Any, ...] = ()  # the values that are accepted

    @property
    def treatment(self) -> str:
        """`honoured`, `accepted`, or with what it is not refused."""
        if self.kind == "honoured":
            return "honoured"
        if self.kind == "informational":
            return "accepted"
        shown = [_spelled(v) for v in self.neutral if v is not None]
        return f"refused unless {' or '.join([*shown, 'null'])}"


def _honoured(text: str) -> Rule:
    return Rule("honoured", text)


def _refused(*accepted: Any, text: str) -> Rule:
    return Rule("neutral", text, (None, *accepted))


def _accepted(text: str) -> Rule:
    return Rule("informational", text)


FIELDS: Mapping[str, Rule] = {
    "r": _honoured("The rank: every tensor must have it, or the one that rank_pattern says."),
    "lora_alpha": _honoured("The scaling alpha / r is multiplied into B."),
    "use_rslora": _honoured("The scaling is alpha / sqrt(r)."),
    "rank_pattern": _honoured(
        "The first pattern that matches the end of a module's path, at a dot, gives its rank."
    ),
    "alpha_pattern": _honoured("The same for alpha."),
    "target_modules": _honoured(
        "A list of suffixes or full paths, a regular expression or all-linear; "
        "embed_tokens and lm_head need a bundle exported with --adapt embed or head."
    ),
    "exclude_modules": _honoured("A list of suffixes or full paths, or a regular expression."),
    "layers_to_transform": _honoured(
        "Only these layers, beside a list; a full path overrules it, as in PEFT."
    ),
    "layers_pattern": _honoured("The name of the list of layers that layers_to_transform counts."),
    "target_parameters": _honoured(
        "The experts' stacked weights need a bundle exported with --adapt experts; "
        "a module's own weight is adapted as the module is."
    ),
    "use_dora": _honoured(
        "The magnitudes are divided by the norms of the adapted weights; the bundle must be "
        "exported with --dora, and such an adapter answers alone and with weight 1."
    ),
    "bias": _honoured(
        "Trained biases are carried as differences from the base's; the bundle must be exported "
        "with --adapter-bias."
    ),
    "lora_bias": _honoured(
        "The bias of B times the scaling is added to the outputs; the bundle must be exported with "
        "--adapter-bias."
    ),
    "trainable_token_indices": _honoured(
        "Each trained token becomes one rank of the embedding, and of a tied head; the bundle must "
        "be exported with --adapt embed, and head."
    ),
    "ensure_weight_tying": _honoured(
        "An adapter on the embedding also answers for a tied head, as PEFT ties them."
    ),
    "alora_invocation_tokens": _honoured(
        "The adapter is active from the last occurrence of these tokens in the prompt on, and not "
        "at all without one."
    ),
    "init_lora_weights": _honoured(
        "Of pissa, olora, corda and lora_ga, which change the base: saved with "
        "path_initial_model_for_weight_conversion the adapter is plain LoRA, else its initial "
        "state is given with --initial; loftq is refused."
    ),
    "peft_type": _refused("LORA", text="only LORA adapters can be carried"),
    "task_type": _refused("CAUSAL_LM", text="only adapters of causal language models are carried"),
    "modules_to_save": _refused(
        [], text=f"whole trained modules are not low-rank changes; {MERGE}"
    ),
    "layer_replication": _refused(
        [], text="repeated layers are another base model; export a checkpoint that has them"
    ),
    "use_qalora": _refused(False, text="QALoRA pools the input, which no bank does"),
    "use_bdlora": _refused(text="BD-LoRA's block-diagonal factors are not carried"),
    "arrow_config": _refused(text="Arrow chooses adapters for each token, which no bank does"),
    "kasa_config": _refused(
        text="KaSA takes singular components out of the base weights, which the bundle still has"
    ),
    "megatron_config": _refused({}, text="Megatron's parallel layers are not carried"),
    "fan_in_fan_out": _accepted(
        "PEFT itself resets it for linear layers, and every supported decoder has only those."
    ),
    "velora_config": _accepted("Changes the backward pass only."),
    "monteclora_config": _accepted("Samples during training only."),
    # Read by PEFT only beside use_qalora, megatron_config or the init_lora_weights named after
    # them, and those are decided above.
    "qalora_group_size": _accepted("Read only beside use_qalora."),
    "megatron_core": _accepted("Read only beside megatron_config."),
    "loftq_config": _accepted("Read only beside init_lora_weights."),
    "eva_config": _accepted("Read only when the adapter is initialised."),
    "corda_config": _accepted("Read only when the adapter is initialised."),
    "lora_ga_config": _accepted("Read only when the adapter is initialised."),
    "lora_dropout": _accepted("Drops during training only."),
    "inference_mode": _accepted("Says whether PEFT would train it."),
    "runtime_config": _accepted("PEFT's own memory placement."),
    "base_model_name_or_path": _accepted("Shown to people; the base is the bundle's."),
    "revision": _accepted("Of the base, for people."),
    "auto_mapping": _accepted("Which class PEFT would load."),
    "peft_version": _accepted("Who wrote it."),
}

# The initialisations that leave the base as it is, beside true and false.
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")

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
            raise Unsupported(f"{where}: {name} = {_shown(value)}: {rule.text}")


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Equality that tells 0 from False and 1 from True, as JSON does."""
    return any(type(value) is type(a) and value == a for a in allowed)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _spelled(value: Any) -> str:
    """As JSON has it, text without its quotes."""
    return value if isinstance(value, str) else json.dumps(value)
