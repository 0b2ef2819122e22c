"""Which layers of Qwen's mixtures of experts mix, and what their checkpoints call the parts."""

from __future__ import annotations

from dataclasses import replace

from remora_build.families.fields import ConfigFields
from remora_build.families.kinds import plain_if_all_plain
from remora_build.families.naming import PLAIN, Words
from remora_contract.decoder import MAX_EXPERTS, MAX_LAYERS, MAX_WIDTH, DecoderSpec, ExpertsSpec
from remora_contract.targets import Projection

SPLIT = PLAIN.but(
    {
        "expert_gate": "mlp.experts.{expert}.gate_proj",
        "expert_up": "mlp.experts.{expert}.up_proj",
        "expert_down": "mlp.experts.{expert}.down_proj",
        "shared_gate": "mlp.shared_expert.gate_proj",
        "shared_up": "mlp.shared_expert.up_proj",
        "shared_down": "mlp.shared_expert.down_proj",
    },
    router="mlp.gate",
    shared_gate="mlp.shared_expert_gate",
)
# transformers 5 holds all experts in two parameters and may save them so.
_STACKS: dict[Projection, str] = {
    "expert_gate": "mlp.experts.gate_up_proj",
    "expert_up": "mlp.experts.gate_up_proj",
    "expert_down": "mlp.experts.down_proj",
}


def read_mixing(fields: ConfigFields, layers: int) -> tuple[bool, ...]:
    """Which layers have experts: every `decoder_sparse_step`-th but for `mlp_only_layers`."""
    step = fields.whole("decoder_sparse_step", MAX_LAYERS, 1)
    dense = fields.take("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise fields.invalid("mlp_only_layers", "a list of layers", dense)
    plain = set(dense)
    return tuple(layer not in plain and (layer + 1) % step == 0 for layer in range(layers))


def mixing_or_plain(spec: DecoderSpec) -> DecoderSpec:
    """Without experts where no layer mixes: then nothing is stored or computed of them."""
    if any(kind.experts for kind in spec.kinds):
        return spec
    return replace(spec, experts=None, kinds=plain_if_all_plain(spec.kinds))


def read_experts(fields: ConfigFields, *count_keys: str) -> ExpertsSpec:
    """Of a Qwen mixture, without a shared expert. `count_keys`: the fields that may hold the
    number of experts."""
    given = {key: value for key in count_keys if (value := fields.take(key)) is not None}
    if len(set(map(str, given.values()))) > 1:
        raise fields.unsupported(count_keys[0], given, "they are one number")
    count = fields.check_whole(count_keys[0], next(iter(given.values()), None), MAX_EXPERTS)
    return ExpertsSpec(
        count=count,
        active=fields.whole("num_experts_per_tok", count),
        intermediate=fields.whole("moe_intermediate_size", MAX_WIDTH),
        renormalize=fields.flag("norm_topk_prob"),
    )


def stacked(words: Words) -> Words:
    return words.but(_STACKS)
