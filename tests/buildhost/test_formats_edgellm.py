"""TensorRT Edge-LLM's files: names, types and values as its tool writes them for plain LoRA; what
the tool gets wrong is written right and refused when it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from remora_build.adapters.convert import read_peft
from remora_build.adapters.formats.carried import Carried
from remora_build.adapters.formats.edgellm import read_edgellm, write_edgellm
from remora_build.adapters.sidecar import Factor
from remora_contract.bundle import Bundle
from remora_contract.errors import AdapterInvalid, ArtifactInvalid, Unsupported
from remora_contract.targets import AdapterTarget
from tests.buildhost.adapter_formats import assert_same_factors, carried, random_factors
from tests.buildhost.documents import (
    decoder_spec,
    peft_tensors,
    plain_config,
    write_bundle,
    write_peft,
)

DECODER = decoder_spec()
WEIGHTS = "processed_adapter_model.safetensors"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("base"), DECODER)


def from_peft(
    bundle: Bundle, directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The tensors we write for a PEFT adapter."""
    factors, source = read_peft(write_peft(directory / "peft", config, tensors), bundle)
    out = directory / "edgellm"
    out.mkdir()
    write_edgellm(out, Carried(factors, source))
    return load_file(out / WEIGHTS)


def tool_directory(directory: Path, config: dict[str, Any], adapter: Carried) -> Path:
    """What NVIDIA's tool leaves: its two files and no remora.json."""
    directory.mkdir(parents=True, exist_ok=True)
    write_edgellm(directory, adapter)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_names_types_and_values_are_the_golden_ones(bundle: Bundle, tmp_path: Path) -> None:
    """Frozen from tensorrt-edgellm-process-lora 0.11: `base_model.model.` goes, both factors are
    transposed to [k, r] and [r, n], B is multiplied by alpha / r, all is float16."""
    peft: dict[str, np.ndarray] = {}
    for layer in range(2):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        a = np.arange(64, dtype=np.float32).reshape(2, 32) / 7 - layer
        b = np.arange(64, dtype=np.float32).reshape(32, 2) / 9 + layer
        peft |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}

    written = from_peft(
        bundle, tmp_path, plain_config(lora_alpha=3, target_modules=["q_proj"]), peft
    )

    assert sorted(written) == [
        f"model.layers.{layer}.self_attn.q_proj.lora_{part}.weight"
        for layer in (0, 1)
        for part in "AB"
    ]
    for layer in range(2):
        stem = f"model.layers.{layer}.self_attn.q_proj"
        a, b = written[f"{stem}.lora_A.weight"], written[f"{stem}.lora_B.weight"]
        assert (a.dtype, a.shape, b.dtype, b.shape) == (np.float16, (32, 2), np.float16, (2, 32))
        for k, r in ((0, 0), (5, 1), (31, 1)):
            assert a[k, r] == np.float16(np.float32(32 * r + k) / np.float32(7) - layer)
            value = np.float32(2 * k + r) / np.float32(9) + np.float32(layer)
            assert b[r, k] == np.float16(value * np.float32(1.5))


def test_the_config_is_pefts_own(bundle: Bundle, tmp_path: Path) -> None:
    from_peft(bundle, tmp_path, plain_config(), peft_tensors(DECODER))
    assert json.loads((tmp_path / "edgellm" / "config.json").read_text()) == plain_config()


def test_reading_gives_back_what_was_written(bundle: Bundle, tmp_path: Path) -> None:
    adapter = carried(DECODER)
    read = read_edgellm(tool_directory(tmp_path, plain_config(), adapter), bundle)
    assert_same_factors(read.factors, adapter.factors)
    assert read.source_config == plain_config()
    assert {f.scaling for f in read.factors.values()} == {2.0}


def test_rslora_is_scaled_by_the_root_of_the_rank(bundle: Bundle, tmp_path: Path) -> None:
    tensors = peft_tensors(DECODER)
    written = from_peft(bundle, tmp_path, plain_config(use_rslora=True, lora_alpha=4), tensors)
    b = tensors["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"]
    scaled = (b.T * np.float32(4 / 2**0.5)).astype(np.float16)
    assert np.array_equal(written["model.layers.0.self_attn.v_proj.lora_B.weight"], scaled)


def test_ranks_and_alphas_of_single_modules_scale_single_modules(
    bundle: Bundle, tmp_path: Path
) -> None:
    tensors = peft_tensors(DECODER)
    stem = "layers.1.self_attn.q_proj"
    for part, shape in (("A", (3, 32)), ("B", (32, 3))):
        tensors[f"base_model.model.model.{stem}.lora_{part}.weight"] = np.ones(shape, np.float32)
    config = plain_config(rank_pattern={stem: 3}, alpha_pattern={stem: 12, "v_proj": 1})

    written = from_peft(bundle, tmp_path, config, tensors)

    assert np.array_equal(written[f"model.{stem}.lora_B.weight"], np.full((3, 32), 4, np.float16))
    b = tensors["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"]
    have = written["model.layers.0.self_attn.v_proj.lora_B.weight"]
    assert np.array_equal(have, (b.T * np.float32(0.5)).astype(np.float16))


def test_a_rank_equal_to_a_dimension_is_no_special_case(bundle: Bundle, tmp_path: Path) -> None:
    tensors = peft_tensors(DECODER, projections="q", rank=32)
    written = from_peft(
        bundle, tmp_path, plain_config(r=32, lora_alpha=32, target_modules=["q_proj"]), tensors
    )
    stem = "layers.0.self_attn.q_proj"
    for part in "AB":
        need = tensors[f"base_model.model.model.{stem}.lora_{part}.weight"].T.astype(np.float16)
        assert np.array_equal(written[f"model.{stem}.lora_{part}.weight"], need)


def test_what_float16_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    factors = random_factors(DECODER, projections=("up",))
    factors[AdapterTarget(1, "up")].b[1, 3] = 70_000
    with pytest.raises(AdapterInvalid, match=r"layers\.1\.mlp\.up_proj\.lora_B.*7e\+04.*no other"):
        write_edgellm(tmp_path, Carried(factors))


def test_an_adapter_without_a_peft_config_gets_one_that_scales_by_one(
    bundle: Bundle, tmp_path: Path
) -> None:
    factors = random_factors(DECODER, projections=("q",), rank=3)
    small = Factor(np.ones((32, 1), np.float32), np.ones((1, 48), np.float32), 1.0)
    factors[AdapterTarget(0, "up")] = small
    write_edgellm(tmp_path, Carried(factors))

    config = json.loads((tmp_path / "config.json").read_text())
    up = "model.layers.0.mlp.up_proj"
    assert (config["r"], config["lora_alpha"]) == (3, 3)
    assert config["rank_pattern"] == config["alpha_pattern"] == {up: 1}
    assert len(config["target_modules"]) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"trainable_token_indices": [1]},
        {"target_parameters": ["experts.gate"]},
        {"layer_replication": [[0, 1]]},
        {"use_qalora": True},
        {"alora_invocation_tokens": [1]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_the_tool_writes_wrongly_is_refused_by_the_fields_name(
    bundle: Bundle, tmp_path: Path, change: dict[str, Any]
) -> None:
    name = next(iter(change))
    tool_directory(tmp_path, plain_config(**change), carried(DECODER))
    with pytest.raises(Unsupported, match=rf"config\.json: {name} = .*convert the PEFT adapter"):
        read_edgellm(tmp_path, bundle)


def test_a_factor_the_tool_may_have_left_untransposed_is_refused(
    bundle: Bundle, tmp_path: Path
) -> None:
    config = plain_config(r=32, lora_alpha=32)
    tool_directory(tmp_path, config, carried(DECODER, projections=("q",), rank=32))
    with pytest.raises(Unsupported, match=r"layers\.0\.q: its rank equals a dimension"):
        read_edgellm(tmp_path, bundle)


def test_a_rank_the_config_does_not_say_was_scaled_by_another(
    bundle: Bundle, tmp_path: Path
) -> None:
    tool_directory(tmp_path, plain_config(r=4), carried(DECODER))
    with pytest.raises(AdapterInvalid, match=r"layers\.0\..* has rank 2, config\.json says 4"):
        read_edgellm(tmp_path, bundle)


@pytest.mark.parametrize("value", [None, "2", True, 0, float("inf")])
def test_a_config_without_a_rank_is_refused(bundle: Bundle, tmp_path: Path, value: Any) -> None:
    tool_directory(tmp_path, plain_config(), carried(DECODER))
    text = json.dumps(plain_config(r=value)).replace("Infinity", "1e12")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(AdapterInvalid, match=r"config\.json: r must be"):
        read_edgellm(tmp_path, bundle)


def test_later_versions_of_the_tool_add_where_it_ran(bundle: Bundle, tmp_path: Path) -> None:
    config = plain_config() | {"edgellm_lora_processing": {"bound": []}}
    read = read_edgellm(tool_directory(tmp_path, config, carried(DECODER)), bundle)
    assert read.source_config == plain_config()


def edited(directory: Path, change: Any) -> None:
    """Writes the weights again after `change` (a function of the dict) was applied."""
    tensors = dict(load_file(directory / WEIGHTS))
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "error", "what"),
    [
        (
            lambda t: t.update({f"{Q}.lora_magnitude_vector.weight": np.ones(32, np.float16)}),
            Unsupported,
            "lora_magnitude_vector.weight is no factor",
        ),
        (
            lambda t: t.update({"model.embed_tokens.lora_A.weight": np.ones((2, 2), np.float16)}),
            Unsupported,
            "model.embed_tokens.lora_A.weight is no factor",
        ),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), AdapterInvalid, f"{Q}.lora_B.weight is missing"),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": np.ones((2, 32), np.float16)}),
            AdapterInvalid,
            r"layers.1.q: A \[2, 32\] and B \[2, 32\] do not fit",
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": np.ones((32, 3), np.float16)}),
            AdapterInvalid,
            r"A \[32, 3\] and B \[2, 32\] do not fit",
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": np.ones(32, np.float16)}),
            AdapterInvalid,
            r"A \[32\]",
        ),
        (
            lambda t: t.update(
                {
                    "model.layers.7.self_attn.q_proj.lora_A.weight": np.ones((32, 2), np.float16),
                    "model.layers.7.self_attn.q_proj.lora_B.weight": np.ones((2, 32), np.float16),
                }
            ),
            AdapterInvalid,
            "layers.7.q: the base has 2 layers",
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": np.full((32, 2), np.nan, np.float16)}),
            AdapterInvalid,
            f"{Q}.lora_A.weight holds NaN",
        ),
        (
            lambda t: t.update({f"{Q}.lora_B.weight": np.ones((2, 32), np.int8)}),
            Unsupported,
            "I8",
        ),
    ],
)
def test_tensors_that_cannot_be_meant_are_named(
    bundle: Bundle, tmp_path: Path, change: Any, error: type[Exception], what: str
) -> None:
    edited(tool_directory(tmp_path, plain_config(), carried(DECODER)), change)
    with pytest.raises(error, match=what):
        read_edgellm(tmp_path, bundle)


def test_a_directory_without_its_config_is_not_guessed_at(bundle: Bundle, tmp_path: Path) -> None:
    tool_directory(tmp_path, plain_config(), carried(DECODER))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ArtifactInvalid, match=r"config\.json does not exist"):
        read_edgellm(tmp_path, bundle)


def test_truncated_weights_are_recognised(bundle: Bundle, tmp_path: Path) -> None:
    tool_directory(tmp_path, plain_config(), carried(DECODER))
    path = tmp_path / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AdapterInvalid, match="truncated"):
        read_edgellm(tmp_path, bundle)
