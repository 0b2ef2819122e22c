"""The text part of a multimodal checkpoint is exported and answers text as the whole model does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_build.families import naming, read_config
from remora_contract.bundle import Bundle, load_bundle
from remora_contract.errors import CheckpointInvalid, Unsupported
from tests.buildhost.reference import reference_logits
from tests.support.checkpoints import edit_config, make_multimodal
from tests.support.portable import PortableModel

MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
MODELS = {
    "gemma3": ("gemma3", "gemma3_text", {}),
    "mistral3": ("mistral3", "mistral", {}),
    "mistral3-ministral3": ("mistral3", "ministral3", {}),
    "llava": ("llava", "llama", {}),
    "llava-qwen2": ("llava", "qwen2", {}),
    "qwen2_vl": ("qwen2_vl", "qwen2_vl_text", MROPE),
    "qwen2_5_vl": ("qwen2_5_vl", "qwen2_5_vl_text", MROPE),
}
WEIGHTS = "model.safetensors"


def make(tmp_path: Path, model: str) -> Path:
    outer, text, settings = MODELS[model]
    return make_multimodal(tmp_path / "checkpoint", outer, text, seed=1, **settings)


def export(checkpoint: Path, out: Path) -> Bundle:
    options = ExportOptions(dtype="float32", max_context=160, max_bank_rank=4)
    return export_checkpoint(checkpoint, out, options)


def renamed(checkpoint: Path, old: str, new: str) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    changed = {new + n.removeprefix(old) if n.startswith(old) else n: t for n, t in tensors.items()}
    save_file(changed, checkpoint / WEIGHTS, metadata={"format": "pt"})


def check_answers(checkpoint: Path, bundle: Path) -> None:
    whole = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokens = np.random.default_rng(3).integers(0, 320, (2, 120))
    have = PortableModel(bundle, rows=2).forced(tokens, prompt=100)
    want = reference_logits(whole, tokens)[:, 99:]
    assert np.abs(have - want).max() <= 1e-4


@pytest.mark.parametrize("model", MODELS)
def test_the_text_part_answers_text_as_the_whole_model(tmp_path, model):
    checkpoint = make(tmp_path, model)
    export(checkpoint, tmp_path / "bundle")
    check_answers(checkpoint, tmp_path / "bundle")


def test_the_bundle_says_what_was_left_out(tmp_path):
    checkpoint = make(tmp_path, "gemma3")
    bundle = export(checkpoint, tmp_path / "bundle")
    assert bundle.source.model_type == "gemma3"
    assert bundle.decoder.family == "gemma3_text"
    left_out = load_bundle(tmp_path / "bundle").notes["left_out"]
    assert set(left_out) == {"vision_tower", "multi_modal_projector"}
    assert left_out["multi_modal_projector"] == "2 tensors"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("language_model.model.", "model.language_model."),
        ("language_model.model.", "model."),
    ],
)
def test_the_decoder_is_found_under_each_of_its_prefixes(tmp_path, old, new):
    checkpoint = make(tmp_path, "gemma3")
    export(checkpoint, tmp_path / "before")
    renamed(checkpoint, old, new)
    export(checkpoint, tmp_path / "after")
    data = [(tmp_path / d / "model.onnx.data").read_bytes() for d in ("before", "after")]
    assert data[0] == data[1]


def test_a_head_that_is_there_is_the_head_whatever_is_said_of_tying(tmp_path):
    checkpoint = make(tmp_path, "mistral3")
    edit_config(checkpoint, tie_word_embeddings=True)
    tensors = load_file(checkpoint / WEIGHTS)
    assert naming(read_config(checkpoint), set(tensors)).spec.tied_embeddings is False
    del tensors["language_model.lm_head.weight"]
    assert naming(read_config(checkpoint), set(tensors)).spec.tied_embeddings is True


def test_the_first_qwen2_vl_kept_its_text_fields_side_by_side(tmp_path):
    checkpoint = make(tmp_path, "qwen2_vl")
    nested = read_config(checkpoint)
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    text.pop("model_type")
    table = text.pop("rope_parameters")
    text["rope_theta"] = table.pop("rope_theta")
    text["rope_scaling"] = {"type": "mrope", "mrope_section": table["mrope_section"]}
    path.write_text(json.dumps(text | config))
    assert read_config(checkpoint) == nested


def test_fields_a_nested_gemma_leaves_out_mean_its_own_defaults(tmp_path):
    checkpoint = make(tmp_path, "gemma3")
    edit_config(
        checkpoint,
        text_config={
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
    )
    spec = read_config(checkpoint)  # what the config.json of Gemma 3 4B says
    assert (spec.heads, spec.kv_heads, spec.head_dim, spec.vocab) == (8, 4, 256, 262208)
    assert (spec.rope.theta, spec.rope.scaling, spec.rope.factor) == (1e6, "linear", 8.0)
    assert spec.local_rope is not None and spec.local_rope.theta == 1e4
    assert [i for i, kind in enumerate(spec.kinds) if kind.window is None] == [5, 11, 17, 23, 29]
    assert spec.tied_embeddings and spec.max_position == 131072


def test_defaults_of_the_usual_text_part_are_not_those_of_another(tmp_path):
    checkpoint = make(tmp_path, "llava-qwen2")
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    edit_config(
        checkpoint,
        text_config={k: v for k, v in text.items() if k != "max_position_embeddings"},
    )
    with pytest.raises(CheckpointInvalid, match="max_position_embeddings"):
        read_config(checkpoint)


@pytest.mark.parametrize("model", ["qwen2_vl", "qwen2_5_vl"])
def test_a_qwen_vl_that_says_nothing_of_key_heads_has_eight(tmp_path, model):
    checkpoint = make(tmp_path, model)
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    less = {k: v for k, v in text.items() if k != "num_key_value_heads"}
    edit_config(checkpoint, text_config=less | {"num_attention_heads": 16, "head_dim": 16})
    assert read_config(checkpoint).kv_heads == 8


def test_a_cap_on_logits_that_the_whole_model_leaves_out_is_refused(tmp_path):
    checkpoint = make(tmp_path, "gemma3")
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    edit_config(checkpoint, text_config=text | {"final_logit_softcapping": 30.0})
    with pytest.raises(Unsupported, match="final_logit_softcapping"):
        read_config(checkpoint)


def test_a_text_part_of_another_family_is_refused_by_name(tmp_path):
    checkpoint = make(tmp_path, "llava")
    config = json.loads((checkpoint / "config.json").read_text())
    edit_config(checkpoint, text_config=config["text_config"] | {"model_type": "zebra"})
    with pytest.raises(Unsupported, match="text_config's model_type is 'zebra'"):
        read_config(checkpoint)


def test_a_field_of_the_wrapper_that_nobody_knows_is_refused(tmp_path):
    checkpoint = make(tmp_path, "llava")
    edit_config(checkpoint, prefix_attends_both_ways=True)
    with pytest.raises(Unsupported, match="prefix_attends_both_ways"):
        read_config(checkpoint)


@pytest.mark.parametrize("inside", [False, True])
def test_a_model_made_into_an_encoder_is_refused(tmp_path, inside):
    """transformers asks the whole model's config for its masks."""
    checkpoint = make(tmp_path, "mistral3")
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    (config["text_config"] if inside else config)["is_causal"] = False
    path.write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="is_causal"):
        read_config(checkpoint)


def test_a_tensor_that_is_neither_text_nor_image_is_refused(tmp_path):
    checkpoint = make(tmp_path, "llava")
    tensors = load_file(checkpoint / WEIGHTS)
    save_file(
        tensors | {"language_model.model.layers.0.self_attn.gate.weight": torch.zeros(1)},
        checkpoint / WEIGHTS,
        metadata={"format": "pt"},
    )
    with pytest.raises(CheckpointInvalid, match=r"self_attn\.gate\.weight"):
        export(checkpoint, tmp_path / "bundle")
