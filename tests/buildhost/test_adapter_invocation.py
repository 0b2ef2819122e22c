"""Activated LoRA in the sidecar: alora_invocation_tokens carried, shown, bounded, refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from remora_build.adapters.convert import Help, convert_adapter
from remora_build.cli import build_app
from remora_contract.adapter import ADAPTER_JSON, MAX_INVOCATION_TOKENS, load_adapter
from remora_contract.bundle import load_bundle
from remora_contract.compat import adapter_refusals
from remora_contract.errors import AdapterInvalid, DocumentInvalid, Unsupported
from tests.buildhost.documents import decoder_spec, write_bundle
from tests.support.adapters import make_peft_adapter

TOKENS = [7, 319, 7]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.checkpoints import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("c"), "qwen3", layers=1, hidden=16, head_dim=8)


@pytest.fixture(scope="module")
def base(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("b") / "base"
    write_bundle(out, decoder_spec(checkpoint))
    return out


@pytest.fixture(scope="module")
def peft_dir(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("p") / "peft"
    return make_peft_adapter(
        checkpoint, out, seed=1, r=2, target_modules=["q_proj"], alora_invocation_tokens=TOKENS
    )


def with_config(peft_dir: Path, **fields: Any) -> Path:
    path = peft_dir / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return peft_dir


def copy(peft_dir: Path, out: Path) -> Path:
    out.mkdir()
    for path in peft_dir.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


def test_the_tokens_are_part_of_the_document_and_of_its_digest(
    base: Path, peft_dir: Path, tmp_path: Path
) -> None:
    adapter = convert_adapter(peft_dir, tmp_path / "a", base=base)
    assert load_adapter(tmp_path / "a").invocation_tokens == tuple(TOKENS)
    assert replace(adapter, invocation_tokens=()).digest != adapter.digest
    other = with_config(copy(peft_dir, tmp_path / "p"), alora_invocation_tokens=None)
    assert convert_adapter(other, tmp_path / "b", base=base).invocation_tokens == ()


def test_no_tokens_at_all_are_plain_lora_as_in_peft(
    base: Path, peft_dir: Path, tmp_path: Path
) -> None:
    other = with_config(copy(peft_dir, tmp_path / "p"), alora_invocation_tokens=[])
    assert convert_adapter(other, tmp_path / "a", base=base).invocation_tokens == ()


def test_inspect_shows_them(base: Path, peft_dir: Path, tmp_path: Path) -> None:
    convert_adapter(peft_dir, tmp_path / "a", base=base)
    runner = CliRunner()
    shown = runner.invoke(build_app(), ["inspect", str(tmp_path / "a")])
    assert "acts from" in shown.output
    assert "7, 319, 7" in shown.output
    data = runner.invoke(build_app(), ["inspect", str(tmp_path / "a"), "--json"])
    assert json.loads(data.output)["document"]["invocation_tokens"] == TOKENS


def test_a_token_outside_the_vocabulary_is_refused(
    base: Path, peft_dir: Path, tmp_path: Path
) -> None:
    vocab = load_bundle(base).decoder.vocab
    other = with_config(copy(peft_dir, tmp_path / "p"), alora_invocation_tokens=[1, vocab])
    with pytest.raises(AdapterInvalid, match=f"token {vocab}, the base's tokens are 0 to"):
        convert_adapter(other, tmp_path / "a", base=base)
    assert not (tmp_path / "a").exists()


def test_a_device_refuses_a_document_with_such_a_token(
    base: Path, peft_dir: Path, tmp_path: Path
) -> None:
    bundle = load_bundle(base)
    adapter = convert_adapter(peft_dir, tmp_path / "a", base=base)
    assert adapter_refusals(bundle, adapter) == []
    (refusal,) = adapter_refusals(
        bundle, replace(adapter, invocation_tokens=(bundle.decoder.vocab,))
    )
    assert refusal.code == "adapter_tokens"


@pytest.mark.parametrize("tokens", [[-1], [1] * (MAX_INVOCATION_TOKENS + 1), [1.5], 7])
def test_a_damaged_document_is_refused(
    base: Path, peft_dir: Path, tmp_path: Path, tokens: object
) -> None:
    convert_adapter(peft_dir, tmp_path / "a", base=base)
    path = tmp_path / "a" / ADAPTER_JSON
    path.write_text(json.dumps({**json.loads(path.read_text()), "invocation_tokens": tokens}))
    with pytest.raises(DocumentInvalid):
        load_adapter(tmp_path / "a")


def test_beside_a_changed_base_it_is_refused_by_name(
    base: Path, peft_dir: Path, tmp_path: Path
) -> None:
    other = with_config(copy(peft_dir, tmp_path / "p"), init_lora_weights="pissa")
    with pytest.raises(Unsupported, match=r"alora_invocation_tokens beside .*'pissa'"):
        convert_adapter(other, tmp_path / "a", base=base, help=Help(initial=peft_dir))


@pytest.mark.parametrize("target", ["edgellm", "trtllm"])
def test_other_formats_have_no_place_for_it(
    base: Path, peft_dir: Path, tmp_path: Path, target: str
) -> None:
    convert_adapter(peft_dir, tmp_path / "sidecar", base=base)
    for source in (peft_dir, tmp_path / "sidecar"):
        arguments = ["adapter", source, tmp_path / "out", "--base", base, "--format", target]
        result = CliRunner().invoke(build_app(), [str(a) for a in arguments])
        assert isinstance(result.exception, Unsupported), result
        assert "invocation_tokens" in str(result.exception)
        assert not (tmp_path / "out").exists()
