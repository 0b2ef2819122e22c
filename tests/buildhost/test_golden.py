"""Golden prompts say what the whole graph answers, though they are recorded a layer at a time."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_build.golden.prompts import BUILTIN_TOKENS, SENTENCES
from remora_build.golden.record import CHECKS
from remora_build.golden.runtime import require_runtime
from remora_contract.bundle import GOLDEN_JSON
from remora_contract.errors import CheckpointInvalid, DocumentInvalid, RequestInvalid, Unsupported
from remora_contract.golden import Golden
from remora_contract.strict import loads
from tests.support.checkpoints import make_checkpoint
from tests.support.portable import PortableModel


def read_golden(bundle) -> Golden:
    return loads(Golden, (bundle / GOLDEN_JSON).read_bytes(), GOLDEN_JSON)


def last_logits(bundle, tokens, count) -> np.ndarray:
    """[count, vocab]: the whole graph's logits at the last positions."""
    model, array = PortableModel(bundle), np.array([tokens])
    return model.forced(array, len(tokens) - count + 1)[0]


@pytest.mark.parametrize(
    ("family", "settings", "options", "tolerance"),
    [
        ("qwen3", {"head_dim": 32}, {"dtype": "float32"}, 1e-4),
        ("qwen2", {"tied": True, "vocab": 321}, {"dtype": "float16"}, 2e-2),
        ("llama", {"vocab": 321}, {"dtype": "float32", "int4_block": 32}, 1e-4),
        ("llama", {}, {"dtype": "float16", "int4_block": 32}, 2e-2),
        ("qwen3", {}, {"dtype": "float32", "max_bank_rank": 0}, 1e-4),
    ],
    ids=["fp32", "fp16-tied-odd-vocab", "int4-odd-vocab", "int4-fp16", "no-bank"],
)
def test_recorded_answers_are_those_of_the_whole_graph(
    tmp_path, family, settings, options, tolerance
):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family, **settings)
    export_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions(**options))
    golden = read_golden(tmp_path / "bundle")
    assert len(golden.prompts) == len(SENTENCES)
    for prompt in golden.prompts:
        assert len(prompt.tokens) <= BUILTIN_TOKENS
        count = len(prompt.expected)
        assert count == min(CHECKS, len(prompt.tokens))
        logits = last_logits(tmp_path / "bundle", prompt.tokens, count)
        top2 = np.sort(logits, axis=-1)[:, -2:]
        assert np.abs(top2[:, 1] - prompt.logit).max() <= tolerance
        assert np.abs(top2[:, 1] - top2[:, 0] - prompt.margin).max() <= 2 * tolerance
        clear = np.array(prompt.margin) > 2 * tolerance
        assert clear.mean() > 0.5
        assert (logits.argmax(-1) == prompt.expected)[clear].all()


@pytest.fixture
def checkpoint(tmp_path):
    return make_checkpoint(tmp_path / "checkpoint", "qwen3")


def export(checkpoint, tmp_path, lines, **options):
    path = tmp_path / "golden.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    chosen = ExportOptions(golden_file=path, max_context=64, **options)
    return export_checkpoint(checkpoint, tmp_path / "bundle", chosen)


def test_prompts_come_from_the_users_file(checkpoint, tmp_path):
    export(checkpoint, tmp_path, [{"tokens": [5, 6, 7]}, "", {"text": "pump 7"}])
    first, second = read_golden(tmp_path / "bundle").prompts
    assert (first.tokens, first.text, len(first.expected)) == ((5, 6, 7), None, 3)
    assert second.text == "pump 7"


BAD = {
    "no JSON": (["{"], DocumentInvalid, "line 1"),
    "unknown key": ([{"text": "a"}, {"prompt": "b"}], DocumentInvalid, "line 2.*prompt"),
    "both": ([{"text": "a", "tokens": [1]}], DocumentInvalid, "exactly one"),
    "nothing": ([""], DocumentInvalid, "0 prompts"),
    "too many": ([{"tokens": [1]}] * 65, DocumentInvalid, "65 prompts"),
    "empty prompt": ([{"tokens": []}], RequestInvalid, "line 1: 0 tokens"),
    "longer than the context": ([{"tokens": [1] * 65}], RequestInvalid, "65 tokens"),
    "outside the vocabulary": ([{"tokens": [320]}], RequestInvalid, "320"),
}


@pytest.mark.parametrize(("lines", "error", "words"), BAD.values(), ids=BAD.keys())
def test_a_bad_prompt_file_is_refused_by_line(checkpoint, tmp_path, lines, error, words):
    with pytest.raises(error, match=words):
        export(checkpoint, tmp_path, lines)
    assert not (tmp_path / "bundle").exists()


def test_without_golden_prompts_the_bundle_says_so(checkpoint, tmp_path):
    bundle = export_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions(golden=False))
    assert "not recorded" in bundle.notes["golden"]
    assert bundle.file(GOLDEN_JSON) is None
    assert not (tmp_path / "bundle" / GOLDEN_JSON).exists()


def test_activations_beyond_float16_are_found_while_recording(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    checkpoint = make_checkpoint(tmp_path / "checkpoint", "qwen2")
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if "down_proj" in name or "up_proj" in name:
            tensors[name] = torch.clamp(tensors[name] * 2000, -60000, 60000)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointInvalid, match=r"layers\.0\.output.*--dtype float32"):
        export_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions())
    assert not (tmp_path / "bundle").exists()


def test_prompts_ignore_the_padding_and_truncation_of_training(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "qwen2")
    export_checkpoint(checkpoint, tmp_path / "plain", ExportOptions())
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=12)
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    export_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions())
    assert read_golden(tmp_path / "bundle") == read_golden(tmp_path / "plain")


def test_a_tokenizer_that_makes_no_tokens_is_not_passed_over(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "qwen2")
    Tokenizer(models.BPE()).save(str(checkpoint / "tokenizer.json"))
    with pytest.raises(RequestInvalid, match="--golden"):
        export_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions())


@pytest.mark.parametrize(
    ("tensor", "where"), [("model.norm.weight", "norm"), ("lm_head.weight", "logits")]
)
def test_answers_that_leave_float16_after_the_last_layer_are_refused(tmp_path, tensor, where):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "llama")
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors[tensor] = np.where(np.arange(64) % 2, 60000, -60000) * np.ones_like(tensors[tensor])
    save_file({k: np.float32(v) for k, v in tensors.items()}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointInvalid, match=f"{where} is not finite.*--dtype float32"):
        export_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions())


@pytest.mark.parametrize("version", ["1.23.2", "1.24.4", "0.9", "1.24.4+cpu"])
def test_a_runtime_that_cannot_run_the_graph_is_refused_with_the_way_out(version):
    with pytest.raises(Unsupported, match="--no-golden"):
        require_runtime(version)


@pytest.mark.parametrize("version", ["1.25.0", "1.32.0", "2.0"])
def test_a_runtime_that_can_is_not(version):
    require_runtime(version)
