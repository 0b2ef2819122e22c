"""Head and embedding in one tensor: the merged model computes what base and adapter compute
together, tied or not. PEFT's own merge does not where an adapter parts the two, so the reference
is its forward pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from remora_contract.errors import AdapterInvalid, Unsupported
from tests.buildhost.merging import (
    adapter,
    assert_same,
    checkpoint,
    load,
    logits,
    merge,
    merged_by_peft,
    state,
    stored,
    with_adapter,
)

PARTED: dict[str, dict[str, Any]] = {
    "head saved": {"modules_to_save": ["lm_head"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "embedding adapted": {"target_modules": ["q_proj", "embed_tokens"]},
    "head adapted": {"target_modules": ["q_proj", "lm_head"]},
    "each adapted": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "dora of the embedding": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "tokens of the head": {"trainable_token_indices": {"lm_head": [1, 2]}},
    "tokens below a LoRA of the head": {
        "target_modules": ["q_proj", "lm_head"],
        "trainable_token_indices": [1, 2],
    },
    "ensured, and scaled apart": {
        "target_modules": ["q_proj", "lm_head"],
        "ensure_weight_tying": True,
        "alpha_pattern": {"embed_tokens": 20},
    },
    "other tokens of each": {"trainable_token_indices": {"lm_head": [1, 2], "embed_tokens": [3]}},
}
KEPT: dict[str, dict[str, Any]] = {
    "neither touched": {},
    "tokens": {"trainable_token_indices": [1, 2]},
    "the same tokens of each": {
        "trainable_token_indices": {"lm_head": [1, 2], "embed_tokens": [1, 2]}
    },
    "saved and ensured": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
}
ENSURED = {
    "target_modules": ["q_proj", "lm_head", "embed_tokens"],
    "ensure_weight_tying": True,
}


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(
        tmp_path_factory.mktemp("tied") / "base", "qwen2", tie_word_embeddings=True, shards=2
    )


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("case", PARTED)
def test_a_head_that_parts_from_its_embedding_gets_a_tensor(
    case: str, tied: Path, tmp_path: Path
) -> None:
    trained = adapter(tied, tmp_path / "peft", **PARTED[case])

    merged = merge(tied, tmp_path / "out", trained)

    got = load(tmp_path / "out")
    torch.testing.assert_close(logits(got), logits(with_adapter(tied, trained)), atol=1e-4, rtol=0)
    assert merged.untied
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert got.lm_head.weight.data_ptr() != got.model.embed_tokens.weight.data_ptr()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shard = index["weight_map"]["model.embed_tokens.weight"]
    assert index["weight_map"]["lm_head.weight"] == shard
    assert set(index["weight_map"]) == set(stored(tmp_path / "out"))
    assert index["metadata"]["total_size"] == sum(
        v.nbytes for v in stored(tmp_path / "out").values()
    )


@pytest.mark.parametrize("case", KEPT)
def test_a_head_that_follows_its_embedding_stays_tied(
    case: str, tied: Path, tmp_path: Path
) -> None:
    trained = adapter(tied, tmp_path / "peft", **KEPT[case])

    merged = merge(tied, tmp_path / "out", trained)

    assert_same(state(load(tmp_path / "out")), merged_by_peft(tied, trained))
    assert not merged.untied
    assert "lm_head.weight" not in stored(tmp_path / "out")
    assert config_of(tmp_path / "out") == config_of(tied)


def test_an_ensured_pair_is_added_once(tied: Path, tmp_path: Path) -> None:
    """PEFT's merge adds the product to the shared tensor twice."""
    trained = adapter(tied, tmp_path / "peft", **ENSURED)

    merged = merge(tied, tmp_path / "out", trained)

    got = logits(load(tmp_path / "out"))
    torch.testing.assert_close(got, logits(with_adapter(tied, trained)), atol=1e-4, rtol=0)
    assert not merged.untied


def test_an_ensured_pair_that_differs_is_refused(tied: Path, tmp_path: Path) -> None:
    trained = adapter(tied, tmp_path / "peft", **ENSURED)
    weights = load_file(trained / "adapter_model.safetensors")
    weights["base_model.model.lm_head.lora_B.weight"][0, 0] += 1
    save_file(weights, trained / "adapter_model.safetensors")

    with pytest.raises(AdapterInvalid, match=r"ensure_weight_tying.*lm_head\.weight"):
        merge(tied, tmp_path / "out", trained)


def test_dora_on_a_head_that_shares_trained_tokens_is_refused(tied: Path, tmp_path: Path) -> None:
    """Its magnitudes belong to norms of the rows as they were."""
    trained = adapter(
        tied,
        tmp_path / "peft",
        target_modules=["lm_head"],
        trainable_token_indices=[1, 2],
        use_dora=True,
    )

    with pytest.raises(Unsupported, match=r"lm_head\.weight has DoRA and shares"):
        merge(tied, tmp_path / "out", trained)
    assert not (tmp_path / "out").exists()


def test_a_stored_copy_of_a_tied_head_counts_as_tied(tied: Path, tmp_path: Path) -> None:
    copied = with_stored_head(tied, tmp_path / "copied")
    trained = adapter(copied, tmp_path / "peft", trainable_token_indices=[1, 2])

    merged = merge(copied, tmp_path / "out", trained)

    got = stored(tmp_path / "out")
    assert (got["lm_head.weight"] == got["model.embed_tokens.weight"]).all()
    assert not merged.untied


def test_a_stored_copy_that_parts_makes_the_config_say_so(tied: Path, tmp_path: Path) -> None:
    copied = with_stored_head(tied, tmp_path / "copied")
    trained = adapter(copied, tmp_path / "peft", modules_to_save=["lm_head"])

    assert merge(copied, tmp_path / "out", trained).untied

    got = load(tmp_path / "out")
    expected = logits(with_adapter(copied, trained))
    torch.testing.assert_close(logits(got), expected, atol=1e-4, rtol=0)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False


def test_several_adapters_part_them_when_one_does(tied: Path, tmp_path: Path) -> None:
    follows = adapter(tied, tmp_path / "a", seed=1, trainable_token_indices=[1])
    parts = adapter(tied, tmp_path / "b", seed=2, target_modules=["lm_head"])

    assert merge(tied, tmp_path / "out", follows, parts).untied

    got = stored(tmp_path / "out")
    tokens = load_file(follows / "adapter_model.safetensors")
    row = tokens["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"][0]
    own = load(tmp_path / "out")
    assert torch.equal(own.model.embed_tokens.weight[1], row)
    alone = tmp_path / "alone"
    merge(tied, alone, parts)
    change = load(alone).lm_head.weight[1] - load(tied).lm_head.weight[1]
    expected = row + change  # its training had the head follow, and the other adapter adds to it
    torch.testing.assert_close(own.lm_head.weight[1], expected, atol=2e-6, rtol=0)
    assert (got["lm_head.weight"] != got["model.embed_tokens.weight"]).any()


def with_stored_head(base: Path, directory: Path) -> Path:
    """The checkpoint in one file, the head beside the embedding although tied."""
    directory.mkdir()
    tensors = {}
    for shard in sorted(base.glob("*.safetensors")):
        tensors |= load_file(shard)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text((base / "config.json").read_text())
    return directory


@pytest.mark.parametrize("tokens_first", [True, False])
def test_tokens_of_one_adapter_and_a_head_of_another_add_up(
    tokens_first: bool, tied: Path, tmp_path: Path
) -> None:
    """base + what each changes: the new tokens in both, the LoRA in the head alone."""
    tokens = adapter(
        tied, tmp_path / "tokens", target_modules=["q_proj"], trainable_token_indices=[1, 2]
    )
    head = adapter(tied, tmp_path / "head", target_modules=["lm_head"])
    each = [tokens, head] if tokens_first else [head, tokens]

    merge(tied, tmp_path / "out", *each)

    merge(tied, tmp_path / "one", tokens)
    merge(tied, tmp_path / "two", head)
    embed = "model.embed_tokens.weight"
    base, with_tokens, with_head, got, got_head = (
        stored(directory)[name].view("<f4")
        for directory, name in (
            (tied, embed),
            (tmp_path / "one", embed),
            (tmp_path / "two", "lm_head.weight"),
            (tmp_path / "out", embed),
            (tmp_path / "out", "lm_head.weight"),
        )
    )
    assert (got == with_tokens).all()
    expected = with_tokens + with_head - base
    assert abs(got_head - expected).max() <= 2e-6
    assert abs(with_tokens - base).max() > 1e-2 < abs(with_head - base).max()
