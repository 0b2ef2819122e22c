"""`inspect`, and the three commands as a user runs them: text, JSON, exit codes, help."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from remora_build.cli import COMMANDS, build_app, needed
from remora_build.inspect.render import ranges, size_text
from remora_build.inspect.repository import describe_repository
from remora_contract.artifact import chunk_key
from remora_contract.bundle import QuantSpec
from remora_contract.decoder import ExpertsSpec, LayerKind, QueryScale, RopeSpec
from remora_contract.digests import short
from remora_contract.errors import ArtifactInvalid, Conflict, DocumentInvalid
from tests.buildhost.documents import (
    BASE_DIGEST,
    decoder_spec,
    peft_tensors,
    plain_config,
    write_bundle,
    write_peft,
)
from tests.support.adapters import random_tensors, write_sidecar


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(build_app(), [str(a) for a in arguments])


def text_of(*arguments: object) -> str:
    """Standard output of a command that must succeed, spaces squeezed."""
    result = run(*arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def json_of(*arguments: object) -> Any:
    return json.loads(text_of(*arguments, "--json"))


def test_a_bundle_is_explained(tmp_path: Path) -> None:
    bundle = write_bundle(
        tmp_path / "b", decoder_spec(), dtype="float16", quant=QuantSpec("int4", 128)
    )
    text = text_of("inspect", tmp_path / "b")
    for part in (
        bundle.digest,
        BASE_DIGEST,
        "qwen3, 2 layers, hidden 32, intermediate 48",
        "4 heads, 2 for keys, 8 each",
        "native dialect, opset 24, float16",
        "int4 in blocks of 128",
        "context 128 tokens",
        "KV cache 128 bytes a token",
        "ranks add up to 64",
        "model.onnx.data │ 7 bytes",
        "not checked",
    ):
        assert part in text
    data = json_of("inspect", tmp_path / "b")
    assert (data["kind"], data["digest"]) == ("bundle", bundle.digest)
    assert data["document"]["graph"]["context"] == 128


def test_what_sets_a_decoder_apart_is_explained(tmp_path: Path) -> None:
    kinds = (
        LayerKind(24, "local", experts=True),
        LayerKind(rope="none", experts=True),
        LayerKind(24),
    )
    decoder = replace(
        decoder_spec(layers=3),
        rope=RopeSpec(1e6, "yarn", 4.0, original_context=64, dims=6, interleaved=True),
        local_rope=RopeSpec(1e4),
        kinds=kinds,
        experts=ExpertsSpec(6, 2, 16, True, shared_intermediate=24),
        block="sandwich",
        qk_norm="head",
        activation="gelu_tanh",
        attention_softcap=50.0,
        query_scale=QueryScale(0.1, 64),
        embedding_scale=8.0,
        logit_softcap=30.0,
    )
    write_bundle(tmp_path / "b", decoder)
    text = text_of("inspect", tmp_path / "b")
    for part in (
        "experts 6 of width 16, 2 for a token, and a shared one of 24; in layers 0-1",
        "scores capped at 50, queries grow beyond position 64",
        "window 24 tokens in layers 0, 2",
        "theta 1e+06, scaling yarn by 4 from 64 tokens, 6 of 8 dimensions, interleaved",
        "local rope theta 10000, scaling none; in layers 0",
        "no rope in layers 1",
        "norms rms, before and behind each block; queries and keys by head",
        "scales embedding 8, logits' cap 30",
        "expert_gate",
        "shared_down",
    ):
        assert part in text


def test_an_adapter_is_explained_by_projection_and_layers(tmp_path: Path) -> None:
    decoder = decoder_spec(layers=5)
    tensors = random_tensors(decoder, seed=0, r=4, projections=("q", "down"))
    tensors |= random_tensors(decoder, seed=0, r=6, projections=("v",), layers=[0, 1, 3])
    adapter = write_sidecar(tmp_path / "a", BASE_DIGEST, tensors, scaling=2.0)
    text = text_of("inspect", tmp_path / "a")
    assert "q │ 4 │ 2 │ 0-4" in text
    assert "v │ 6 │ 2 │ 0-1, 3" in text
    assert "rank 6 bank columns" in text
    data = json_of("inspect", tmp_path / "a")
    assert (data["digest"], data["projections"]) == (adapter.digest, ["q", "v", "down"])
    assert len(data["document"]["targets"]) == 13


def test_text_from_outside_is_shown_as_it_is(tmp_path: Path) -> None:
    tensors = random_tensors(decoder_spec(), seed=0)
    config = {"peft_type": "LORA", "base_model_name_or_path": "[red]x[/red] [/nothing]"}
    write_sidecar(tmp_path / "[bold]", BASE_DIGEST, tensors, source_config=config)
    text = text_of("inspect", tmp_path / "[bold]")
    assert "[red]x[/red] [/nothing]" in text
    assert "[bold]" in text


def test_a_repository_is_explained(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", decoder_spec())
    adapter = write_sidecar(tmp_path / "a", BASE_DIGEST, random_tensors(decoder_spec(), seed=0))
    text_of("publish", tmp_path / "b", tmp_path / "repo", "--name", "base")
    report = json_of("publish", tmp_path / "a", tmp_path / "repo", "--revision", "r1")
    assert (report["name"], report["revision"], report["digest"]) == ("a", "r1", adapter.digest)

    text = text_of("inspect", tmp_path / "repo", "--verify")
    data = json_of("inspect", tmp_path / "repo")

    assert f"bundle │ base │ {short(bundle.digest)} │ {short(bundle.digest)}" in text
    assert f"adapter │ a │ r1 │ {short(adapter.digest)}" in text
    assert "match their digests" in text
    assert [n["name"] for n in data["names"]] == ["base", "a"]
    assert data["names"][1]["facts"]["rank"] == 4


def test_an_empty_repository_is_explained(tmp_path: Path) -> None:
    (tmp_path / "repo" / "cas").mkdir(parents=True)
    assert json_of("inspect", tmp_path / "repo")["names"] == []


@pytest.mark.parametrize("kind", ["bundle", "adapter"])
def test_verify_finds_a_damaged_file(tmp_path: Path, kind: str) -> None:
    if kind == "bundle":
        write_bundle(tmp_path / "x", decoder_spec())
        damaged = tmp_path / "x" / "model.onnx"
    else:
        write_sidecar(tmp_path / "x", BASE_DIGEST, random_tensors(decoder_spec(), seed=0))
        damaged = tmp_path / "x" / "adapter.safetensors"
    assert "all" in text_of("inspect", tmp_path / "x", "--verify")
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    text_of("inspect", tmp_path / "x")
    with pytest.raises(ArtifactInvalid, match=f"{damaged.name} is damaged"):
        text_of("inspect", tmp_path / "x", "--verify")


def test_verify_finds_a_damaged_chunk_and_a_missing_one_is_always_found(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", decoder_spec())
    text_of("publish", tmp_path / "b", tmp_path / "repo")
    chunk = tmp_path / "repo" / chunk_key(bundle.files[0].digest)
    chunk.write_bytes(bytes(chunk.stat().st_size))
    text_of("inspect", tmp_path / "repo")
    with pytest.raises(ArtifactInvalid, match=f"{chunk.name} is damaged"):
        text_of("inspect", tmp_path / "repo", "--verify")
    chunk.unlink()
    with pytest.raises(ArtifactInvalid, match=r"bundle b revision .* 1 chunks are missing"):
        text_of("inspect", tmp_path / "repo")


def test_a_name_without_its_manifest_is_an_error(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", decoder_spec())
    text_of("publish", tmp_path / "b", tmp_path / "repo")
    next((tmp_path / "repo" / "manifests").iterdir()).unlink()
    with pytest.raises(ArtifactInvalid, match=r"manifest .* is missing"):
        text_of("inspect", tmp_path / "repo")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("adapter_config.json", "remora-build adapter"),
        ("processed_adapter_model.safetensors", "Edge-LLM.*remora-build adapter"),
        ("model.lora_weights.npy", "TensorRT-LLM.*remora-build adapter"),
        ("config.json", "export"),
    ],
)
def test_inspect_says_what_a_directory_may_be(tmp_path: Path, name: str, hint: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ArtifactInvalid, match=f"neither a bundle.*{hint}"):
        text_of("inspect", tmp_path)


def test_the_adapter_command_converts_and_reports(tmp_path: Path) -> None:
    write_bundle(tmp_path / "base", decoder_spec())
    peft_dir = write_peft(tmp_path / "peft", plain_config(), peft_tensors(decoder_spec()))
    arguments = ("adapter", peft_dir, tmp_path / "out", "--base", tmp_path / "base")

    data = json_of(*arguments, "--dtype", "float16")
    assert (data["kind"], data["document"]["dtype"], data["rank"]) == ("adapter", "float16", 2)
    with pytest.raises(Conflict):
        text_of(*arguments)
    assert "somewhere/base" in text_of(*arguments, "--force")


def test_what_stands_in_brackets_is_shown() -> None:
    """typer reads help as markup, in which they are styles."""
    assert "Needs remora[agent] and remora[tensorrt]" in text_of("engine", "--help")


@pytest.mark.parametrize("arguments", [["inspect", "x"], ["use-cases", "show"], ["engine"]])
def test_a_call_imports_the_command_it_names_alone(arguments: list[str]) -> None:
    assert needed(arguments) == arguments[:1]
    assert len(build_app(needed(arguments)).registered_commands) <= 1


@pytest.mark.parametrize("arguments", [[], ["--help"], ["adaptr"], ["--install-completion"]])
def test_a_call_that_names_none_knows_all(arguments: list[str]) -> None:
    assert set(needed(arguments)) == set(COMMANDS)


def test_commands_are_listed_by_the_names_they_register() -> None:
    for name in COMMANDS:
        alone = typer.main.get_command(build_app([name]))
        assert list(alone.commands) == [name]  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", ["adapter", "publish", "inspect"])
def test_every_option_has_help(command: str) -> None:
    listed = build_app()
    found = next(c for c in listed.registered_commands if c.name == command)
    assert found.help
    assert run(command, "--help").exit_code == 0
    assert found.callback is not None
    import inspect

    for parameter in inspect.signature(found.callback).parameters.values():
        assert parameter.default.help, parameter.name


@pytest.mark.parametrize(
    "arguments",
    [("adapter",), ("publish", "/nowhere", "/x"), ("inspect",), ("adapter", "--dtype", "int8")],
)
def test_wrong_usage_exits_with_two(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


@given(st.sets(st.integers(0, 40)))
def test_ranges_name_exactly_the_numbers(numbers: set[int]) -> None:
    named: set[int] = set()
    for part in filter(None, ranges(sorted(numbers)).split(", ")):
        first, _, last = part.partition("-")
        named |= set(range(int(first), int(last or first) + 1))
    assert named == numbers


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB (1500)")]
)
def test_sizes_stay_exact(count: int, text: str) -> None:
    assert size_text(count) == text


def test_text_from_outside_cannot_steer_the_terminal(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "\x1b[2J\x1b]0;owned\x07 \u202e"}
    tensors = random_tensors(decoder_spec(), seed=0)
    write_sidecar(tmp_path / "a", BASE_DIGEST, tensors, source_config=config)
    text = text_of("inspect", tmp_path / "a")
    assert r"\x1b[2J\x1b]0;owned\x07 \u202e" in text
    assert not set("\x1b\x07\u202e") & set(text)


def test_a_stray_file_among_the_names_is_named(tmp_path: Path) -> None:
    (tmp_path / "names" / "bundle" / "not a name").mkdir(parents=True)
    (tmp_path / "names" / "bundle" / "not a name" / "v.json").write_text("{}")
    with pytest.raises(DocumentInvalid, match=r"not a name/v\.json"):
        describe_repository(tmp_path)
