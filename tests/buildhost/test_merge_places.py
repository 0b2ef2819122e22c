"""Modules of the model in memory are found in checkpoints that spell them otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from remora_build.checkpoint.safetensors_file import TensorEntry
from remora_build.merge.changes import Experts, LowRank
from remora_build.merge.names import sort_tensors
from remora_build.merge.operands import Loader
from remora_build.merge.panels import panels
from remora_build.merge.places import DIALECTS, Places
from remora_contract.errors import AdapterInvalid
from tests.buildhost.merging import (
    SIZES,
    adapter,
    checkpoint,
    load,
    logits,
    merge,
    quiet,
    randomize,
    with_adapter,
)

TEXT = {**{k: v for k, v in SIZES.items() if not k.endswith("_token_id")}, "head_dim": 8}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
LAYER = "model.layers.3.mlp.up_proj"


def multimodal(directory: Path) -> Any:
    with quiet():
        return transformers.Gemma3ForConditionalGeneration.from_pretrained(directory).eval()


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its text model lies below language_model. on disk, below model.language_model. in memory."""
    tokens = {"image_token_index": 63, "boi_token_index": 61, "eoi_token_index": 62}
    config = transformers.AutoConfig.for_model(
        "gemma3", text_config=TEXT, vision_config=VISION, mm_tokens_per_image=1, **tokens
    )
    directory = tmp_path_factory.mktemp("gemma") / "base"
    with quiet():
        model = transformers.Gemma3ForConditionalGeneration(config)
        randomize(model, seed=0)
        model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"], "exclude_modules": ".*vision.*"},
        {"target_modules": ["q_proj", "fc1"]},
        {"target_modules": r".*language_model.*q_proj", "modules_to_save": ["lm_head"]},
        {"target_modules": r".*language_model.*(q_proj|embed_tokens)"},
    ],
)
def test_a_multimodal_model_is_merged(config: Any, gemma: Path, tmp_path: Path) -> None:
    with quiet():
        model = peft.get_peft_model(multimodal(gemma), peft.LoraConfig(r=4, **config))
        randomize(model, seed=1, trained_only=True)
        model.save_pretrained(tmp_path / "peft")
        trained = peft.PeftModel.from_pretrained(multimodal(gemma), tmp_path / "peft").eval()

    merge(gemma, tmp_path / "out", tmp_path / "peft")

    got = multimodal(tmp_path / "out")
    torch.testing.assert_close(logits(got), logits(trained), atol=1e-4, rtol=0)


def test_an_adapter_of_the_text_model_fits_the_multimodal_checkpoint(
    gemma: Path, tmp_path: Path
) -> None:
    text = checkpoint(tmp_path / "text", "gemma3_text", head_dim=8)
    with quiet():
        alone = load(text)
        alone.load_state_dict(
            {
                n.replace("model.language_model.", "model."): p
                for n, p in multimodal(gemma).state_dict().items()
                if "vision" not in n and "multi_modal" not in n
            }
        )
        alone.save_pretrained(text)
    trained = adapter(text, tmp_path / "peft")

    merge(gemma, tmp_path / "out", trained)

    expected = logits(with_adapter(text, trained))
    torch.testing.assert_close(logits(multimodal(tmp_path / "out")), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("config", [{}, {"modules_to_save": ["lm_head"]}])
def test_a_checkpoint_saved_without_its_head_is_merged(config: Any, tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", "gpt2")
    with quiet():
        load(base).transformer.save_pretrained(tmp_path / "headless")
    document = json.loads((tmp_path / "headless" / "config.json").read_text())
    document["architectures"] = ["GPT2LMHeadModel"]
    (tmp_path / "headless" / "config.json").write_text(json.dumps(document))
    trained = adapter(base, tmp_path / "peft", target_modules=["c_attn"], **config)

    merge(tmp_path / "headless", tmp_path / "out", trained)

    expected = logits(with_adapter(base, trained))
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_spelling_has_an_inverse(dialect: Any) -> None:
    paths = (LAYER, "lm_head", f"model.language_{LAYER}", f"language_model.{LAYER}")
    stored = {path: dialect.stored(path) for path in paths}
    assert any(stored.values())
    for path, spelled in stored.items():
        assert spelled is None or dialect.in_model(spelled) == path


def test_the_plain_spelling_is_tried_first() -> None:
    places = Places({f"{LAYER}.weight": (4, 4), f"language_model.{LAYER}.weight": (4, 4)})
    first = next(d for d in DIALECTS if places.knows(LAYER, d))
    assert places.tensor(LAYER, "weight", first) == f"{LAYER}.weight"


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.sampled_from(["BF16", "F32"]),
    st.integers(1, 2000),
)
def test_panels_cover_every_row_once_and_no_block_twice(
    shape: list[int], dtype: Any, budget: int
) -> None:
    import remora_build.merge.panels as module

    entry = TensorEntry("x", dtype, tuple(shape), Path("x"), 0)
    height = shape[1] if len(shape) == 3 else None
    usual, module.PANEL_BYTES = module.PANEL_BYTES, budget
    try:
        found = list(panels(entry, height))
    finally:
        module.PANEL_BYTES = usual
    rows = [r for p in found for r in range(p.first, p.first + p.count)]
    assert rows == list(range(int(np.prod(shape[:-1]))))
    for p in found:
        assert p.first == p.block * (height or 0) + p.offset
        assert height is None or p.offset + p.count <= height


@given(st.text(max_size=60))
def test_any_name_is_sorted_or_refused_as_an_adapters(name: str) -> None:
    try:
        found = sort_tensors([f"base_model.model.{name}"])
    except AdapterInvalid:
        return
    assert len(found.factors) + len(found.wholes) + len(found.tokens) == 1


class InMemory:
    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.tensors = tensors

    def float32(self, name: str) -> np.ndarray:
        return self.tensors[name]


def test_every_expert_gets_its_own_columns_and_rows() -> None:
    """Against PEFT's own reshapes, written out."""
    experts, rank, inputs, outputs = 3, 2, 5, 6
    random = np.random.default_rng(0)
    a = random.standard_normal((rank * experts, inputs)).astype(np.float32)
    b = random.standard_normal((outputs, rank * experts)).astype(np.float32)
    want = np.einsum(
        "ore,eri->eoi", b.reshape(outputs, rank, experts), a.reshape(experts, rank, inputs)
    )
    loader = Loader([InMemory({"a": a, "b": b})])
    for expert in range(experts):
        part = LowRank(0, "a", "b", rank, 1.0, False, Experts(experts, expert, (2, 5)))
        whole = LowRank(0, "a", "b", rank, 1.0, True, Experts(experts, None, (0, outputs)))
        half, full = loader.operands([part]), loader.operands([whole], expert)
        np.testing.assert_allclose(half.left @ half.right, want[expert, 2:5], atol=1e-6)
        np.testing.assert_allclose(full.left @ full.right, want[expert].T, atol=1e-6)


@pytest.mark.parametrize("names", [["down_proj"], r".*\.(o_proj|up_proj|down_proj)"])
def test_names_that_stored_experts_share_select_only_modules_in_memory(
    names: Any, tmp_path: Path
) -> None:
    """Stored, `experts.0.down_proj` is a tensor of its own; in memory it is part of a stack."""
    base = checkpoint(tmp_path / "base", "qwen2_moe")
    trained = adapter(base, tmp_path / "peft", target_modules=names)

    merge(base, tmp_path / "out", trained)

    wanted = logits(with_adapter(base, trained))
    torch.testing.assert_close(logits(load(tmp_path / "out")), wanted, atol=1e-4, rtol=0)
    assert (wanted - logits(load(base))).abs().max() > 1e-2


def test_an_adapter_that_lost_the_tensors_of_all_experts_is_an_error(tmp_path: Path) -> None:
    """No other module of Mixtral is called w1, so nothing else can have been meant."""
    base = checkpoint(tmp_path / "base", "mixtral")
    trained = adapter(base, tmp_path / "peft", target_modules=["q_proj"])
    path = trained / "adapter_config.json"
    config = json.loads(path.read_text())
    for names in (["q_proj", "w1"], r".*\.(q_proj|w1)"):
        path.write_text(json.dumps(config | {"target_modules": names}))
        with pytest.raises(AdapterInvalid, match=r"no tensors.*experts\.0\.w1"):
            merge(base, tmp_path / "out", trained)
        assert not (tmp_path / "out").exists()
