"""Adapters of mixtures of experts: on stacked weights, on single experts, and on the router."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from remora_agent.bank.weights import load_weights
from remora_agent.engine.protocol import MixEntry
from remora_build.adapters.convert import convert_adapter
from remora_contract.bundle import load_bundle
from remora_contract.errors import AdapterInvalid, Unsupported
from tests.buildhost.test_adapter_kinds import (
    EVERYTHING,
    PROMPT,
    TOLERANCE,
    World,
    converted,
    engine_logits,
    make_world,
    reference,
    some_tokens,
    worst,
)
from tests.support.adapters import make_peft_adapter
from tests.support.bank_feed import feed
from tests.support.portable import PortableModel

WITH_EXPERTS = replace(EVERYTHING, adapt=("embed", "head", "experts"))
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "both": {"r": 3, "target_modules": ["q_proj"], "target_parameters": EXPERTS},
    "gate_up": {"r": 2, "target_modules": [], "target_parameters": EXPERTS[:1]},
    "down": {"r": 2, "target_modules": [], "target_parameters": ["experts.down_proj"]},
    "ranks": {
        "r": 2,
        "target_modules": ["o_proj"],
        "target_parameters": EXPERTS,
        "use_rslora": True,
        "rank_pattern": {"experts.gate_up_proj": 5},
        "alpha_pattern": {r"layers\.1\.mlp\.experts\.down_proj": 3},
    },
}
FAMILIES = ("qwen3_moe", "mixtral", "qwen2_moe")


@pytest.fixture(scope="module", params=FAMILIES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), request.param, False, WITH_EXPERTS)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_answer_as_peft_on_graph_and_engine(
    kind: str, world: World, tmp_path: Path
) -> None:
    bundle, tokens = load_bundle(world.bundle_dir), some_tokens(2)
    peft_dir, sidecar = converted(world, tmp_path, "one", **KINDS[kind])
    wanted = reference(world.checkpoint, tokens[:1], peft_dir)
    plain = reference(world.checkpoint, tokens)

    model = PortableModel(world.bundle_dir, rows=2)
    model.adapter_feed = feed(bundle, [sidecar], [[1.0], [0.0]])
    graph = model.forced(tokens, PROMPT)
    assert worst(graph[:1], wanted) <= TOLERANCE
    assert worst(graph[1:], plain[1:]) <= TOLERANCE
    for engine in world.engines:
        handle = engine.add_adapter(load_weights(sidecar, bundle))
        alone = engine_logits(engine, tokens[:1], [(MixEntry(handle, 1.0),)])
        beside = engine_logits(engine, tokens, [(MixEntry(handle, 1.0),), ()])
        engine.remove_adapter(handle)
        after = engine_logits(engine, tokens[:1], [()])

        assert worst(alone, wanted) <= TOLERANCE
        assert worst(beside[:1], wanted) <= TOLERANCE
        assert worst(beside[1:], plain[1:]) <= TOLERANCE
        assert worst(alone, plain[:1]) > 20 * TOLERANCE
        assert worst(after, plain[:1]) <= TOLERANCE


def test_two_adapters_on_experts_answer_by_their_weights(world: World, tmp_path: Path) -> None:
    bundle, tokens = load_bundle(world.bundle_dir), some_tokens(2)
    peft_dir, out = converted(world, tmp_path, "one", **KINDS["both"])
    wanted = reference(world.checkpoint, tokens, peft_dir)
    for engine in world.engines:
        handles = [engine.add_adapter(load_weights(out, bundle)) for _ in range(2)]
        half = tuple(MixEntry(h, 0.5) for h in handles)
        found = engine_logits(engine, tokens, [half, (MixEntry(handles[1], 1.0),)])
        for handle in handles:
            engine.remove_adapter(handle)
        assert worst(found, wanted) <= TOLERANCE


def test_experts_trained_one_by_one_are_carried_as_stacked_ones(
    world: World, tmp_path: Path
) -> None:
    """As transformers 4 had them: a module for each expert."""
    if load_bundle(world.bundle_dir).decoder.family != "qwen3_moe":
        pytest.skip("one family's names are enough")
    stacked = make_peft_adapter(
        world.checkpoint, tmp_path / "stacked", seed=1, r=2, target_modules=[],
        target_parameters=["mlp.experts.down_proj"],
    )  # fmt: skip
    tensors = load_file(stacked / "adapter_model.safetensors")
    split: dict[str, np.ndarray] = {}
    for name in [n for n in tensors if n.endswith("lora_A.weight")]:
        layer = re.search(r"layers\.\d+", name)[0]  # type: ignore[index]
        a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        for expert in range(4):
            stem = f"base_model.model.model.{layer}.mlp.experts.{expert}.down_proj"
            split[f"{stem}.lora_A.weight"] = np.ascontiguousarray(a.reshape(4, 2, -1)[expert])
            split[f"{stem}.lora_B.weight"] = np.ascontiguousarray(b.reshape(-1, 2, 4)[:, :, expert])
    config = json.loads((stacked / "adapter_config.json").read_text())
    config |= {"target_modules": ["down_proj"], "target_parameters": None}
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "adapter_config.json").write_text(json.dumps(config))
    save_file(split, tmp_path / "split" / "adapter_model.safetensors")

    whole = convert_adapter(stacked, tmp_path / "a", base=world.bundle_dir)
    parts = convert_adapter(tmp_path / "split", tmp_path / "b", base=world.bundle_dir)

    assert whole.targets == parts.targets
    files = [(tmp_path / d / "adapter.safetensors").read_bytes() for d in "ab"]
    assert files[0] == files[1]
    del split[next(iter(split))]
    save_file(split, tmp_path / "split" / "adapter_model.safetensors")
    with pytest.raises(AdapterInvalid, match=r"missing: model\.layers\.0\.mlp\.experts\.0\."):
        convert_adapter(tmp_path / "split", tmp_path / "c", base=world.bundle_dir)


def test_an_adapter_that_lost_the_tensors_of_all_experts_is_an_error(
    world: World, tmp_path: Path
) -> None:
    """A name that only experts have must have some of them; one that the shared expert has too may
    mean that alone."""
    family = load_bundle(world.bundle_dir).decoder.family
    names = ["q_proj", "w1" if family == "mixtral" else "down_proj"]
    trained = make_peft_adapter(
        world.checkpoint, tmp_path / "peft", seed=1, r=2, target_modules=["q_proj"]
    )
    path = trained / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": names}))
    lost = "shared_expert" if family == "qwen2_moe" else r"experts\.0\."
    with pytest.raises(AdapterInvalid, match=rf"tensors are missing: .*{lost}"):
        convert_adapter(trained, tmp_path / "out", base=world.bundle_dir)


def test_an_adapter_on_the_router_is_refused_by_its_name(world: World, tmp_path: Path) -> None:
    peft_dir = make_peft_adapter(
        world.checkpoint, tmp_path / "peft", seed=1, r=2, target_modules=["q_proj"],
        target_parameters=["mlp.gate.weight"],
    )  # fmt: skip
    with pytest.raises(Unsupported, match=r"mlp\.gate chooses or weighs experts"):
        convert_adapter(peft_dir, tmp_path / "out", base=world.bundle_dir)
