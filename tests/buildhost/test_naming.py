"""Names of tensors and modules, family by family, and their inverses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from remora_build.families import naming, namings
from remora_build.families.naming import PLAIN, Naming, Source
from remora_contract.decoder import DecoderSpec, ExpertsSpec, LayerKind, RopeSpec
from remora_contract.errors import Unsupported
from remora_contract.targets import AdapterTarget

SPEC = DecoderSpec(
    family="llama",
    layers=2,
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    intermediate=96,
    vocab=320,
    norm_eps=1e-5,
    rope=RopeSpec(1e4),
)
FUSED = replace(
    PLAIN,
    projections=PLAIN.projections
    | dict.fromkeys(("q", "k", "v"), "self_attn.qkv_proj")
    | dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"),
)
MOE = replace(
    SPEC,
    kinds=(LayerKind(), LayerKind(experts=True)),
    experts=ExpertsSpec(3, 2, 32, True),
)
SPLIT_EXPERTS = replace(
    PLAIN,
    projections=PLAIN.projections
    | {f"expert_{p}": f"mlp.experts.{{expert}}.{p}_proj" for p in ("gate", "up", "down")},
    router="mlp.gate",
)
STACKED_EXPERTS = replace(
    SPLIT_EXPERTS,
    projections=PLAIN.projections
    | dict.fromkeys(("expert_gate", "expert_up"), "mlp.experts.gate_up_proj")
    | {"expert_down": "mlp.experts.down_proj"},
)


def parts(naming: Naming, path: str):
    found = (naming.modules() | naming.parameters())[path]
    return [(p.target.name(), p.begin, p.end, p.expert) for p in found]


def test_every_module_of_a_plain_model_is_one_projection():
    plain = naming(SPEC)
    assert parts(plain, "model.layers.1.self_attn.k_proj") == [("layers.1.k", 0, 32, None)]
    assert parts(plain, "model.layers.0.mlp.down_proj") == [("layers.0.down", 0, 64, None)]
    assert parts(plain, "model.embed_tokens") == [("embed", 0, 320, None)]
    assert parts(plain, "lm_head") == [("head", 0, 320, None)]
    assert len(plain.modules()) == 2 * 7 + 2
    assert not plain.parameters() and not plain.unadaptable()


def test_a_fused_module_is_several_projections_row_by_row():
    fused = Naming(SPEC, FUSED)
    assert parts(fused, "model.layers.0.self_attn.qkv_proj") == [
        ("layers.0.q", 0, 64, None),
        ("layers.0.k", 64, 96, None),
        ("layers.0.v", 96, 128, None),
    ]
    assert fused.weight(1, "up") == Source("model.layers.1.mlp.gate_up_proj.weight", 96, 192)
    assert fused.weights(1, "gate_up") == (
        Source("model.layers.1.mlp.gate_up_proj.weight", 0, 192),
    )
    assert fused.tensors()["model.layers.1.self_attn.qkv_proj.weight"] == (128, 64)
    assert "model.layers.1.self_attn.q_proj.weight" not in fused.tensors()


def test_experts_lie_apart_or_in_one_parameter():
    split, stacked = Naming(MOE, SPLIT_EXPERTS), Naming(MOE, STACKED_EXPERTS)
    assert parts(split, "model.layers.1.mlp.experts.2.up_proj") == [
        ("layers.1.expert_up", 0, 32, 2)
    ]
    assert split.tensors()["model.layers.1.mlp.experts.0.down_proj.weight"] == (64, 32)
    assert not split.parameters()
    assert parts(stacked, "model.layers.1.mlp.experts.gate_up_proj") == [
        ("layers.1.expert_gate", 0, 32, None),
        ("layers.1.expert_up", 32, 64, None),
    ]
    assert stacked.tensors()["model.layers.1.mlp.experts.gate_up_proj"] == (3, 64, 64)
    assert stacked.weights(1, "expert_gate_up", 2) == (
        Source("model.layers.1.mlp.experts.gate_up_proj", 0, 64, 2),
    )
    assert not any("experts" in path for path in stacked.modules())


def test_a_layer_without_experts_has_none_of_their_names():
    split = Naming(MOE, SPLIT_EXPERTS)
    assert not any(".layers.0.mlp.experts" in name for name in split.tensors())
    assert "model.layers.0.mlp.up_proj.weight" in split.tensors()
    assert "model.layers.1.mlp.up_proj.weight" not in split.tensors()
    assert split.unadaptable() == {"model.layers.1.mlp.gate"}


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("model.", "lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
        ("language_model.model.", "language_model.lm_head.weight"),
        ("", "lm_head.weight"),
    ],
)
def test_the_place_is_found_by_the_tensors_that_are_there(prefix, head):
    wanted = next(n for n in namings(SPEC) if n.place.prefix == prefix)
    found = naming(SPEC, set(wanted.tensors()))
    assert found == wanted
    assert found.embedding == f"{prefix}embed_tokens.weight"
    assert found.head == head


def test_every_tensor_of_a_projection_belongs_to_one_module():
    for one in (naming(SPEC), Naming(SPEC, FUSED), Naming(MOE, SPLIT_EXPERTS)):
        targets = [p.target for ps in one.modules().values() for p in ps if not p.expert]
        assert len(targets) == len(set(targets))
        wanted = {AdapterTarget(i, p) for i in range(2) for p in one.spec.projections(i)}
        assert set(targets) == wanted | {AdapterTarget(0, "embed"), AdapterTarget(0, "head")}


def test_a_family_of_another_version_is_refused_by_name():
    with pytest.raises(Unsupported, match="'zebra'"):
        namings(replace(SPEC, family="zebra"))
