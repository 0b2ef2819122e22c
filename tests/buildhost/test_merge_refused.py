"""What cannot be merged faithfully is refused by its name, and nothing is written then."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from remora_build.merge import factors
from remora_build.merge.fields import FIELDS, MERGED
from remora_build.merge.settings import parse_merge_settings
from remora_contract.errors import AdapterInvalid, CheckpointInvalid, RemoraError, Unsupported
from tests.buildhost.documents import plain_config, write_peft
from tests.buildhost.merging import adapter, checkpoint, merge

NEUTRAL = sorted(name for name, rule in FIELDS.items() if rule.kind == "neutral")
STEM = "base_model.model.model.layers.{}.self_attn.{}"
Q = STEM.format(1, "q_proj")
EMBED = "base_model.model.model.embed_tokens"
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("base") / "base")


def plain_tensors(rank: int = 2) -> Tensors:
    """q_proj and v_proj of both layers, as documents.plain_config selects them."""
    rng = np.random.default_rng(0)
    found = {}
    for layer in (0, 1):
        for module, outputs in (("q_proj", 32), ("v_proj", 16)):
            for part, shape in (("A", (rank, 32)), ("B", (outputs, rank))):
                values = rng.standard_normal(shape).astype(np.float32)
                found[f"{STEM.format(layer, module)}.lora_{part}.weight"] = values
    return found


@pytest.fixture
def refused(base: Path, tmp_path: Path) -> Callable[..., str]:
    """The error of merging plain tensors with some changed (None: taken away)."""

    def run(kind: type[RemoraError], config: Any = None, **changes: Any) -> str:
        tensors = {n: v for n, v in (plain_tensors() | changes).items() if v is not None}
        trained = write_peft(tmp_path / "peft", plain_config(**(config or {})), tensors)
        with pytest.raises(kind) as caught:
            merge(base, tmp_path / "out", trained)
        assert [p.name for p in tmp_path.iterdir()] == ["peft"]
        return str(caught.value)

    return run


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def test_the_plain_adapter_is_accepted(base: Path, tmp_path: Path) -> None:
    trained = write_peft(tmp_path / "peft", plain_config(), plain_tensors())
    assert merge(base, tmp_path / "out", trained).changed == 4


WRONG: dict[str, tuple[type[RemoraError], dict[str, Any], dict[str, Any], str]] = {
    "no tensor of PEFT's": (AdapterInvalid, {}, {"q.weight": zeros(1)}, "q.weight is not named"),
    "a path": (AdapterInvalid, {}, {"base_model.model.../../x": zeros(1)}, r"\.\./\.\./x"),
    "an endless name": (AdapterInvalid, {}, {"x" * 5000: zeros(1)}, "name of 5000 characters"),
    "an unknown part": (
        AdapterInvalid,
        {},
        {f"{Q}.lora_C.weight": zeros(2, 2)},
        "lora_C.weight is none that PEFT's LoRA saves",
    ),
    "kasa's diagonal": (AdapterInvalid, {}, {f"{Q}.lora_diag": zeros(2)}, "lora_diag is none"),
    "half a pair": (AdapterInvalid, {}, {f"{Q}.lora_B.weight": None}, "but no lora_B"),
    "a missing pair": (
        AdapterInvalid,
        {},
        {f"{Q}.lora_A.weight": None, f"{Q}.lora_B.weight": None},
        r"no tensors in the adapter: model\.layers\.1\.self_attn\.q_proj\.weight",
    ),
    "an unselected module": (
        AdapterInvalid,
        {"target_modules": ["v_proj"]},
        {},
        "neither target_modules nor target_parameters .* selects .*q_proj",
    ),
    "an excluded module": (
        AdapterInvalid,
        {"exclude_modules": r".*\.1\..*q_proj"},
        {},
        r"selects model\.layers\.1\.self_attn\.q_proj",
    ),
    "a deeper base": (
        AdapterInvalid,
        {},
        {f"{STEM.format(9, 'q_proj')}.lora_A.weight": zeros(2, 32)},
        r"the checkpoint has no model\.layers\.9\.self_attn\.q_proj",
    ),
    "a wider base": (
        AdapterInvalid,
        {},
        {f"{Q}.lora_A.weight": zeros(2, 40)},
        r"is \[2, 40\], this checkpoint needs \[2, 32\].*another base.*somewhere/base",
    ),
    "another rank": (
        AdapterInvalid,
        {"r": 4},
        {},
        "its rank is 2, the config says 4",
    ),
    "a factor of three dimensions": (
        AdapterInvalid,
        {},
        {f"{Q}.lora_A.weight": zeros(2, 32, 1)},
        r"is \[2, 32, 1\]",
    ),
    "embedding factors on a projection": (
        AdapterInvalid,
        {},
        {f"{Q}.lora_embedding_A": zeros(2, 32), f"{Q}.lora_embedding_B": zeros(32, 2)},
        "has no meaning beside",
    ),
    "a magnitude without use_dora": (
        AdapterInvalid,
        {},
        {f"{Q}.lora_magnitude_vector": zeros(32)},
        "does not say use_dora: .*lora_magnitude_vector",
    ),
    "use_dora without a magnitude": (
        AdapterInvalid,
        {"use_dora": True},
        {},
        "says use_dora: model.*has no lora_magnitude_vector",
    ),
    "a bias on B not said": (
        AdapterInvalid,
        {},
        {f"{Q}.lora_B.bias": zeros(32)},
        "lora_bias is False",
    ),
    "a bias on B without one below": (
        Unsupported,
        {"lora_bias": True, "target_modules": [Q.removeprefix("base_model.model.")]},
        {
            f"{Q}.lora_B.bias": zeros(32),
            **{n: None for n in plain_tensors() if not n.startswith(Q)},
        },
        "lora_bias: .*q_proj of the checkpoint has no bias.*PEFT cannot",
    ),
    "a bias not said": (
        AdapterInvalid,
        {},
        {"base_model.model.model.norm.bias": zeros(32)},
        r"the checkpoint has no model\.norm\.bias",
    ),
    "a norm not said": (
        AdapterInvalid,
        {},
        {"base_model.model.model.norm.weight": zeros(32)},
        "trains it neither as a bias .* nor as a whole .*modules_to_save",
    ),
    "a saved module without tensors": (
        AdapterInvalid,
        {"modules_to_save": ["lm_head"]},
        {},
        r"no tensors in the adapter: lm_head\.weight",
    ),
    "a saved module of another shape": (
        AdapterInvalid,
        {"modules_to_save": ["model.norm"]},
        {"base_model.model.model.norm.weight": zeros(31)},
        r"is \[31\], the checkpoint's is \[32\]",
    ),
    "a grown vocabulary": (
        Unsupported,
        {"modules_to_save": ["lm_head"]},
        {"base_model.model.lm_head.weight": zeros(70, 32)},
        r"has 70 rows, the checkpoint's vocabulary 64.*resize_token_embeddings\(70\)",
    ),
    "trained tokens not said": (
        AdapterInvalid,
        {},
        {f"{EMBED}.token_adapter.trainable_tokens_delta": zeros(2, 32)},
        "trainable_token_indices .* names no rows",
    ),
    "a token twice": (
        AdapterInvalid,
        {"trainable_token_indices": [1, 1]},
        {f"{EMBED}.token_adapter.trainable_tokens_delta": zeros(2, 32)},
        "trainable_token_indices repeats a token",
    ),
    "fewer tokens than said": (
        AdapterInvalid,
        {"trainable_token_indices": [1, 2, 3]},
        {f"{EMBED}.token_adapter.trainable_tokens_delta": zeros(2, 32)},
        r"is \[2, 32\], 3 rows",
    ),
    "a token outside the vocabulary": (
        AdapterInvalid,
        {"trainable_token_indices": [1, 64]},
        {f"{EMBED}.token_adapter.trainable_tokens_delta": zeros(2, 32)},
        "token 64 is none of 64",
    ),
    "a stack of experts in a dense model": (
        AdapterInvalid,
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"base_model.model.model.layers.0.mlp.experts.lora_A.weight": zeros(6, 32)},
        r"the checkpoint has no model\.layers\.0\.mlp\.experts",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_tensor_without_place_is_refused_by_name(case: str, refused: Callable[..., str]) -> None:
    kind, config, changes, words = WRONG[case]
    assert re.search(words, refused(kind, config, **changes))


def test_an_absurd_rank_is_refused_before_it_is_read(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factors, "MAX_FACTOR_BYTES", 255)
    assert "rank 2 is absurd" in refused(AdapterInvalid)
    assert "r must be a whole number" in refused(AdapterInvalid, {"r": 1 << 30})


HEADERS = {
    "a header of 10 GB": ((10 << 30).to_bytes(8, "little") + b"{}", "claims 10737418240 bytes"),
    "a cut header": ((4000).to_bytes(8, "little") + b"{}", "truncated"),
    "an empty file": (b"", "truncated"),
    "10 GB of data": (
        b'{"base_model.model.x":{"dtype":"F32","shape":[2684354560],"data_offsets":[0,10737418240]}}',
        "promises 10737418",
    ),
    "a tensor twice": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        "lists a tensor twice",
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_hostile_file_is_refused(case: str, base: Path, tmp_path: Path) -> None:
    data, words = HEADERS[case]
    if data.startswith(b"{"):
        data = len(data).to_bytes(8, "little") + data + b"\0" * 4
    trained = write_peft(tmp_path / "peft", plain_config(), plain_tensors())
    (trained / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(AdapterInvalid, match=words):
        merge(base, tmp_path / "out", trained)


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (base / "config.json").write_text(json.dumps(config))
    trained = write_peft(tmp_path / "peft", plain_config(), plain_tensors())
    with pytest.raises(Unsupported, match=r"quantized.*original checkpoint"):
        merge(base, tmp_path / "out", trained)


def test_a_checkpoint_with_an_expert_missing_is_refused(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", "qwen3_moe")
    trained = adapter(base, tmp_path / "peft", target_parameters=["mlp.experts.down_proj"])
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.1.down_proj.weight"]
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(CheckpointInvalid, match=r"lacks model\.layers\.1\.mlp\.experts\.1\.down"):
        merge(base, tmp_path / "out", trained)


def test_every_field_of_the_installed_peft_is_in_the_table() -> None:
    import peft

    assert {f.name for f in dataclasses.fields(peft.LoraConfig)} == set(FIELDS)


def test_every_field_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "merge.md").read_text()
    assert [name for name in FIELDS if f"`{name}`" not in text] == []


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_feature_that_cannot_be_merged_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(Unsupported, match=rf"file: {name} = .+: \w"):
        MERGED.check({name: {"something": 1}}, "file")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_an_initialisation_that_changed_the_base_is_refused(init: str) -> None:
    with pytest.raises(Unsupported, match=r"init_lora_weights.*path_initial_model"):
        MERGED.check({"init_lora_weights": init}, "file")


@pytest.mark.parametrize(
    "kind", ["ADALORA", "LOHA", "LOKR", "IA3", "VERA", "PREFIX_TUNING", "TRAINABLE_TOKENS"]
)
def test_other_kinds_of_adapter_are_refused_by_their_name(kind: str) -> None:
    with pytest.raises(Unsupported, match=rf"peft_type = '{kind}'.*only LORA"):
        MERGED.check({"a_field_of_theirs": 1, "peft_type": kind}, "file")


def test_an_unknown_field_that_says_something_is_refused() -> None:
    with pytest.raises(Unsupported, match="use_lora_of_2031"):
        MERGED.check({"use_lora_of_2031": 1}, "file")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bias", "some"),
        ("use_dora", 1),
        ("lora_bias", "yes"),
        ("modules_to_save", "lm_head"),
        ("modules_to_save", [""]),
        ("target_parameters", [7]),
        ("target_parameters", [""]),
        ("ensure_weight_tying", 0),
        ("trainable_token_indices", [-1]),
        ("trainable_token_indices", ["1"]),
        ("trainable_token_indices", {"embed_tokens": 1}),
        ("trainable_token_indices", 5),
    ],
)
def test_a_value_peft_could_not_use_is_refused_by_its_field(name: str, value: object) -> None:
    with pytest.raises(RemoraError, match=name):
        parse_merge_settings(plain_config(**{name: value}), "file")


def test_dora_with_a_bias_on_b_is_refused_as_by_peft() -> None:
    with pytest.raises(AdapterInvalid, match="lora_bias beside use_dora"):
        parse_merge_settings(plain_config(use_dora=True, lora_bias=True), "file")
