"""Everything PEFT's LoraConfig trains, from a real adapter to logits: transformers + peft against
the portable graph and the device's engines (TensorRT's on the emulator), float32 within 1e-4, rows
of one batch mixed."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from remora_agent.bank.weights import load_weights
from remora_agent.engine.cache import EngineCache
from remora_agent.engine.opening import EngineOptions, open_engine
from remora_agent.engine.protocol import Engine, MixEntry, RowStep
from remora_build.adapters.convert import Help, convert_adapter
from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_build.merge.adapter import Weighted
from remora_build.merge.merger import merge_adapters
from remora_contract.bundle import load_bundle
from remora_contract.errors import (
    AdapterInvalid,
    Incompatible,
    Refused,
    RequestInvalid,
    Unsupported,
)
from tests.buildhost.test_adapter_logits import reference
from tests.support.adapters import make_peft_adapter
from tests.support.bank_feed import feed
from tests.support.checkpoints import make_checkpoint
from tests.support.portable import PortableModel
from tests.support.trt_engines import Bench, build

TOLERANCE = 1e-4
PROMPT, STEPS, VOCAB = 6, 4, 320
EVERYTHING = ExportOptions(
    dtype="float32",
    max_context=64,
    max_bank_rank=128,
    adapt=("embed", "head"),
    dora=True,
    adapter_bias=True,
    golden=False,
)
QV = ["q_proj", "v_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4},
    "dora": {"r": 4, "use_dora": True},
    "dora rslora": {"r": 3, "use_dora": True, "use_rslora": True, "target_modules": QV},
    "bias all": {"r": 4, "bias": "all", "target_modules": ["q_proj", "down_proj"]},
    "bias lora_only": {"r": 4, "bias": "lora_only", "target_modules": ["k_proj", "o_proj"]},
    "lora_bias": {"r": 4, "lora_bias": True, "lora_alpha": 6},
    "dora bias": {"r": 2, "use_dora": True, "bias": "all", "target_modules": QV},
    "embed": {"r": 3, "target_modules": ["embed_tokens", "q_proj"]},
    "head": {"r": 3, "target_modules": ["lm_head", "up_proj"], "use_rslora": True},
    "embed and head": {"r": 3, "target_modules": ["embed_tokens", "lm_head"]},
    "copied embeddings": {
        "r": 2,
        "target_modules": ["embed_tokens", "lm_head"],
        "save_embedding_layers": True,
    },
    "dora embed": {"r": 3, "target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
    "head bias": {"r": 3, "target_modules": ["lm_head", "q_proj"], "lora_bias": True},
    "tokens": {"r": 2, "target_modules": QV, "trainable_token_indices": [3, 5, 200]},
    "tokens below a tied head's lora": {
        "r": 2,
        "target_modules": ["q_proj", "lm_head"],
        "trainable_token_indices": [3, 5, 200],
    },
    "tied embeddings": {
        "r": 2,
        "target_modules": ["embed_tokens", "q_proj"],
        "ensure_weight_tying": True,
    },
    "a module's parameter": {"r": 2, "target_modules": [], "target_parameters": ["q_proj.weight"]},
}
ONLY_TIED = {"tied embeddings"}


@dataclass(frozen=True)
class World:
    """A checkpoint, its bundle with every adapter input, and its engines."""

    checkpoint: Path
    bundle_dir: Path
    engine: Engine  # on ONNX Runtime
    emulated: Engine  # on TensorRT's emulator

    @property
    def engines(self) -> tuple[Engine, Engine]:
        return self.engine, self.emulated


def make_world(
    directory: Path, family: Any, tied: bool, options: ExportOptions, **ck: Any
) -> World:
    checkpoint = make_checkpoint(directory / "checkpoint", family, tied=tied, seed=3, **ck)
    export_checkpoint(checkpoint, directory / "bundle", options)
    bundle = directory / "bundle"
    cache = EngineCache(directory / "engines", 1 << 40)
    engine_options = EngineOptions(rows=4, threads=1, accuracy_level=1)
    engine = open_engine(bundle, cache, engine_options)
    # Last: it links the weights, and no checker reads linked ones.
    emulated = Bench(bundle, build(bundle, directory / "emulated")).open()
    return World(checkpoint, bundle, engine, emulated)


@pytest.fixture(scope="module", params=["qwen2 tied", "llama"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    family, _, tied = request.param.partition(" ")
    bias = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    return make_world(tmp_path_factory.mktemp("world"), family, bool(tied), EVERYTHING, **bias)


def some_tokens(rows: int) -> np.ndarray:
    tokens = np.random.default_rng(5).integers(0, VOCAB, (rows, PROMPT + STEPS))
    tokens[:, 2], tokens[:, PROMPT] = 5, 200  # tokens that an adapter replaces
    return tokens


def engine_logits(engine: Engine, tokens: np.ndarray, mixes: list[Any]) -> np.ndarray:
    """[rows, STEPS + 1, vocab]: prefill row by row, then all rows in each step."""
    found = np.zeros((len(tokens), STEPS + 1, engine.limits.vocab), np.float32)
    for row, mix in enumerate(mixes):
        found[row, 0] = engine.prefill(row, tokens[row, :PROMPT], 0, mix)
    for step in range(STEPS):
        at = PROMPT + step
        steps = [RowStep(r, int(tokens[r, at]), at, mix) for r, mix in enumerate(mixes)]
        found[:, step + 1] = engine.decode(steps)
    return found


def converted(world: World, directory: Path, name: str, **kind: Any) -> tuple[Path, Path]:
    """(the PEFT directory, the sidecar)"""
    peft_dir = make_peft_adapter(world.checkpoint, directory / f"{name}.peft", seed=7, **kind)
    out = directory / f"{name}.remora"
    convert_adapter(peft_dir, out, base=world.bundle_dir)
    return peft_dir, out


def worst(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted[:, PROMPT - 1 :]).max())


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_answers_as_peft_on_graph_and_engine(
    kind: str, world: World, tmp_path: Path
) -> None:
    bundle = load_bundle(world.bundle_dir)
    if kind in ONLY_TIED and not bundle.decoder.tied_embeddings:
        pytest.skip("the base has nothing tied")
    tokens = some_tokens(2)
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
        mix = (MixEntry(handle, 1.0),)
        alone = engine_logits(engine, tokens[:1], [mix])
        beside = engine_logits(engine, tokens, [mix, ()])
        scored = engine.score(0, tokens[0], 0, mix)
        engine.remove_adapter(handle)
        after = engine_logits(engine, tokens[:1], [()])

        assert worst(alone, wanted) <= TOLERANCE
        assert np.abs(scored - wanted[0]).max() <= TOLERANCE
        assert worst(beside[:1], wanted) <= TOLERANCE
        assert worst(beside[1:], plain[1:]) <= TOLERANCE
        assert worst(alone, plain[:1]) > 20 * TOLERANCE  # it does change something
        assert worst(after, plain[:1]) <= TOLERANCE


def test_dora_on_a_head_that_shares_trained_tokens_is_refused(world: World, tmp_path: Path) -> None:
    if not load_bundle(world.bundle_dir).decoder.tied_embeddings:
        pytest.skip("the head has rows of its own")
    kind = {"target_modules": ["lm_head"], "trainable_token_indices": [5], "use_dora": True}
    with pytest.raises(Unsupported, match="lm_head has DoRA, and shares the trained tokens"):
        converted(world, tmp_path, "one", r=2, **kind)


def test_rows_with_every_kind_of_adapter_answer_in_one_batch(world: World, tmp_path: Path) -> None:
    bundle, tokens = load_bundle(world.bundle_dir), some_tokens(4)
    kinds = ["plain", "dora bias", "tokens"]
    made = [converted(world, tmp_path, str(i), **KINDS[k]) for i, k in enumerate(kinds)]
    adapters = [(peft_dir,) for peft_dir, _ in made] + [()]
    wanted = [
        reference(world.checkpoint, tokens[row : row + 1], *paths)
        for row, paths in enumerate(adapters)
    ]
    for engine in world.engines:
        handles = [engine.add_adapter(load_weights(out, bundle)) for _, out in made]
        found = engine_logits(engine, tokens, [*((MixEntry(h, 1.0),) for h in handles), ()])
        for handle in handles:
            engine.remove_adapter(handle)
        for row, logits in enumerate(wanted):
            assert worst(found[row : row + 1], logits) <= TOLERANCE


def test_a_dora_adapter_answers_alone_and_whole_or_not_at_all(world: World, tmp_path: Path) -> None:
    bundle, tokens = load_bundle(world.bundle_dir), some_tokens(1)[0, :PROMPT]
    made = [converted(world, tmp_path, n, **KINDS[n])[1] for n in ("dora", "plain")]
    for engine in world.engines:
        dora, plain = handles = [engine.add_adapter(load_weights(out, bundle)) for out in made]
        for mix in (
            (MixEntry(dora, 0.5),),
            (MixEntry(dora, 1.0), MixEntry(plain, 1.0)),
        ):
            with pytest.raises(RequestInvalid, match="DoRA adapter: it answers alone"):
                engine.prefill(0, tokens, 0, mix)
            engine.prefill(0, tokens, 0)
            with pytest.raises(RequestInvalid, match="DoRA adapter: it answers alone"):
                engine.decode([RowStep(0, 1, PROMPT, mix)])
        for handle in handles:
            engine.remove_adapter(handle)


def test_biases_and_tokens_take_a_weight_as_factors_do(world: World, tmp_path: Path) -> None:
    """Half of two equal adapters is one of them."""
    bundle, tokens = load_bundle(world.bundle_dir), some_tokens(1)
    kind = {"r": 2, "bias": "all", "target_modules": QV, "trainable_token_indices": [5, 200]}
    peft_dir, out = converted(world, tmp_path, "one", **kind)
    wanted = reference(world.checkpoint, tokens, peft_dir)
    for engine in world.engines:
        handles = [engine.add_adapter(load_weights(out, bundle)) for _ in range(2)]
        found = engine_logits(engine, tokens, [tuple(MixEntry(h, 0.5) for h in handles)])
        for handle in handles:
            engine.remove_adapter(handle)
        assert worst(found, wanted) <= TOLERANCE


def test_a_merge_is_refused_on_another_checkpoint_than_the_bundle_was_made_of(
    world: World, tmp_path: Path
) -> None:
    """Of the same shapes, which is all that PEFT's own files tell."""
    peft_dir, _ = converted(world, tmp_path, "one", r=2, use_dora=True, target_modules=QV)
    other = tmp_path / "other"
    shutil.copytree(world.checkpoint, other)
    weights = load_file(other / "model.safetensors")
    name = next(n for n in weights if n.endswith("up_proj.weight"))
    weights[name] = weights[name] * np.float32(1.001)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    merged = [Weighted(peft_dir)]

    with pytest.raises(Refused, match="not the base of the bundle: its weights"):
        merge_adapters(other, merged, tmp_path / "out", base=world.bundle_dir)
    assert not (tmp_path / "out").exists()
    merge_adapters(world.checkpoint, merged, tmp_path / "out", base=world.bundle_dir)
    merge_adapters(other, merged, tmp_path / "unasked")


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("dora", "--dora"),
        ("lora_bias", "--adapter-bias"),
        ("embed", "--adapt embed"),
        ("head", "--adapt head"),
    ],
)
def test_a_bundle_without_the_inputs_refuses_and_says_how_to_export(
    kind: str, option: str, world: World, tmp_path: Path
) -> None:
    options = replace(EVERYTHING, adapt=(), dora=False, adapter_bias=False)
    export_checkpoint(world.checkpoint, tmp_path / "bundle", options)
    bare = replace(world, bundle_dir=tmp_path / "bundle")
    with pytest.raises(Incompatible, match=f"exported with {option}"):
        converted(bare, tmp_path, "one", **KINDS[kind])
    _, out = converted(world, tmp_path, "two", **KINDS[kind])
    with pytest.raises(Incompatible, match=f"exported with {option}"):
        load_weights(out, load_bundle(tmp_path / "bundle"))


def test_dora_on_a_quantized_bundle_asks_for_the_checkpoint_and_proves_it(
    world: World, tmp_path: Path
) -> None:
    options = replace(EVERYTHING, int4_block=32)
    export_checkpoint(world.checkpoint, tmp_path / "int4", options)
    peft_dir, plain = converted(world, tmp_path, "one", **KINDS["dora"])
    with pytest.raises(Refused, match="--checkpoint"):
        convert_adapter(peft_dir, tmp_path / "out", base=tmp_path / "int4")

    help = Help(checkpoint=world.checkpoint)
    adapter = convert_adapter(peft_dir, tmp_path / "out", base=tmp_path / "int4", help=help)
    same = (tmp_path / "out" / "adapter.safetensors").read_bytes()
    assert adapter.dora and same == (plain / "adapter.safetensors").read_bytes()

    family = load_bundle(world.bundle_dir).decoder.family
    other = make_checkpoint(
        tmp_path / "other",
        family,
        seed=4,
        tied=family == "qwen2",
        **({"attention_bias": True, "mlp_bias": True} if family == "llama" else {}),
    )
    with pytest.raises(Refused, match="not the base of the bundle"):
        convert_adapter(
            peft_dir, tmp_path / "no", base=tmp_path / "int4", help=Help(checkpoint=other)
        )
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("kind", ["dora bias", "embed and head", "tokens"])
def test_on_quantized_weights_engine_and_graph_agree(kind: str, tmp_path: Path) -> None:
    options = replace(EVERYTHING, int4_block=32)
    world = make_world(tmp_path, "qwen2", True, options)
    bundle, tokens = load_bundle(world.bundle_dir), some_tokens(2)
    peft_dir = make_peft_adapter(world.checkpoint, tmp_path / "peft", seed=7, **KINDS[kind])
    help = Help(checkpoint=world.checkpoint)
    convert_adapter(peft_dir, tmp_path / "out", base=world.bundle_dir, help=help)

    model = PortableModel(world.bundle_dir, rows=2)
    model.adapter_feed = feed(bundle, [tmp_path / "out"], [[1.0], [0.0]])
    graph = model.forced(tokens, PROMPT)
    for engine in world.engines:
        handle = engine.add_adapter(load_weights(tmp_path / "out", bundle))
        found = engine_logits(engine, tokens, [(MixEntry(handle, 1.0),), ()])
        engine.close()
        assert float(np.abs(found - graph).max()) <= TOLERANCE


def test_trained_biases_of_norms_are_refused_by_name(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "stablelm", seed=3)
    export_checkpoint(checkpoint, tmp_path / "bundle", EVERYTHING)
    settings: dict[str, Any] = {"target_modules": ["o_proj"], "bias": "all"}
    peft_dir = make_peft_adapter(checkpoint, tmp_path / "peft", seed=1, **settings)

    with pytest.raises(AdapterInvalid, match=r"norm\.bias is the trained bias of a norm"):
        convert_adapter(peft_dir, tmp_path / "out", base=tmp_path / "bundle")
