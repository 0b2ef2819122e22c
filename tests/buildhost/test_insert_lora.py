"""`remora-build insert-lora` on exports of torch.onnx: logits as transformers + peft within 1e-4,
each row with its own adapter; and what a user types wrongly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from remora_build.adapters.convert import convert_adapter
from remora_build.cli import build_app
from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_build.insert.description import load_bank
from remora_build.insert.feed import bank_inputs, read_sidecar
from remora_contract.errors import Conflict, InvalidInput, NotFound, Refused
from tests.support.adapters import make_peft_adapter
from tests.support.checkpoints import make_checkpoint
from tests.support.foreign import (
    answers,
    peft_tensors,
    reference_logits,
    torchscript_export,
)
from tests.support.respell import strip_names

TOKENS = np.random.default_rng(3).integers(0, 320, (4, 9))
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tied": True, "attention_bias": True, "mlp_bias": True},
    "qwen3": {},
    "phi3": {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.75}},
}
MODULES = {"phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}
SOME_MODULES = {"phi3": ["o_proj", "gate_up_proj"]}


def insert(*arguments: object) -> str:
    """What the command prints; its error is raised."""
    result = CliRunner().invoke(build_app(), ["insert-lora", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, its export)"""
    root = tmp_path_factory.mktemp("llama")
    checkpoint = make_checkpoint(root / "checkpoint", "llama", **FAMILIES["llama"])
    return checkpoint, torchscript_export(checkpoint, root / "model.onnx")


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_answer_as_transformers_with_their_own_peft_adapter(
    family: str, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family, **FAMILIES[family])
    model = torchscript_export(checkpoint, tmp_path / "model.onnx")
    some = SOME_MODULES.get(family, ["q_proj", "v_proj", "down_proj"])
    first = make_peft_adapter(
        checkpoint, tmp_path / "a", seed=1, r=4, target_modules=MODULES.get(family)
    )
    second = make_peft_adapter(
        checkpoint, tmp_path / "b", seed=2, r=3, use_rslora=True, target_modules=some
    )

    insert(model, tmp_path / "out")
    adapters = [peft_tensors(first), peft_tensors(second)]
    weights = [[0, 0], [1, 0], [0, 1], [0, 0]]
    feed = bank_inputs(load_bank(tmp_path / "out"), adapters, weights)
    have = answers(tmp_path / "out" / "model.onnx", TOKENS, feed)

    for row, peft_dir in enumerate([None, first, second, None]):
        want = reference_logits(checkpoint, TOKENS[row : row + 1], peft_dir)
        np.testing.assert_allclose(have[row : row + 1], want, atol=1e-4)


def test_a_converted_sidecar_is_all_it_takes(llama: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, model = llama
    options = ExportOptions(dtype="float32", max_context=32, max_bank_rank=8, golden=False)
    export_checkpoint(checkpoint, tmp_path / "bundle", options)
    peft_dir = make_peft_adapter(
        checkpoint, tmp_path / "peft", seed=4, r=4, rank_pattern={"down_proj": 7, "q_proj": 1}
    )
    convert_adapter(peft_dir, tmp_path / "sidecar", base=tmp_path / "bundle")
    insert(model, tmp_path / "out")

    adapter = read_sidecar(tmp_path / "sidecar")
    feed = bank_inputs(load_bank(tmp_path / "out"), [adapter], [[1.0]])  # one row for all rows
    have = answers(tmp_path / "out" / "model.onnx", TOKENS, feed)

    np.testing.assert_allclose(have, reference_logits(checkpoint, TOKENS, peft_dir), atol=1e-4)


def test_a_bank_of_no_columns_changes_not_one_bit(llama: tuple[Path, Path], tmp_path: Path) -> None:
    insert(llama[1], tmp_path / "out")
    feed = bank_inputs(load_bank(tmp_path / "out"), [], np.zeros((4, 0)))
    assert all(0 in array.shape for array in feed.values())
    have = answers(tmp_path / "out" / "model.onnx", TOKENS, feed)
    np.testing.assert_array_equal(have, answers(llama[1], TOKENS))


def test_a_float16_export_takes_float16_factors(llama: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint = llama[0]
    model = torchscript_export(checkpoint, tmp_path / "half.onnx", dtype="float16")
    peft_dir = make_peft_adapter(checkpoint, tmp_path / "peft", seed=5, r=4)
    insert(model, tmp_path / "out")

    feed = bank_inputs(load_bank(tmp_path / "out"), [peft_tensors(peft_dir)], [[1.0]])
    assert {array.dtype for array in feed.values()} == {np.dtype("float16")}
    have = answers(tmp_path / "out" / "model.onnx", TOKENS, feed)

    want = reference_logits(checkpoint, TOKENS, peft_dir)
    assert np.abs(have - want).max() < 0.05 < np.abs(want).max()


def test_a_graph_whose_names_say_nothing_is_read_by_its_structure(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    model = onnx.load(llama[1])
    strip_names(model)
    onnx.save(model, tmp_path / "bare.onnx")
    insert(llama[1], tmp_path / "named")
    insert(tmp_path / "bare.onnx", tmp_path / "bare")

    adapter = peft_tensors(make_peft_adapter(llama[0], tmp_path / "peft", seed=6))
    feed = bank_inputs(load_bank(tmp_path / "bare"), [adapter], [[1.0]])
    named, bare = (answers(tmp_path / d / "model.onnx", TOKENS, feed) for d in ("named", "bare"))
    np.testing.assert_allclose(bare, named, atol=1e-5)


def test_weights_outside_the_model_file_stay_there(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    model = onnx.load(llama[1])
    onnx.save(
        model,
        tmp_path / "big.onnx",
        save_as_external_data=True,
        all_tensors_to_one_file=False,
        size_threshold=256,
    )
    stored = {
        t.name: t
        for t in onnx.load(tmp_path / "big.onnx", load_external_data=False).graph.initializer
    }
    insert(tmp_path / "big.onnx", tmp_path / "out")

    after = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    assert {t.name: t for t in after.graph.initializer} == stored
    assert len(list((tmp_path / "out").iterdir())) > 10
    feed = bank_inputs(load_bank(tmp_path / "out"), [], np.zeros((1, 0)))
    have = answers(tmp_path / "out" / "model.onnx", TOKENS, feed)
    np.testing.assert_array_equal(have, answers(llama[1], TOKENS))


def test_equal_input_gives_equal_bytes(llama: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        insert(llama[1], tmp_path / name)
    for file in ("model.onnx", "attach.json", "lora.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_nothing_of_the_model_changes_but_what_is_added(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    insert(llama[1], tmp_path / "out")
    before, after = (onnx.load(p) for p in (llama[1], tmp_path / "out" / "model.onnx"))
    onnx.checker.check_model(after, full_check=True)
    assert (after.ir_version, after.opset_import) == (before.ir_version, before.opset_import)
    assert list(after.graph.output) == list(before.graph.output)
    assert list(after.graph.input)[:2] == list(before.graph.input)
    assert list(after.graph.initializer) == list(before.graph.initializer)
    kept = [n for n in after.graph.node if not n.name.startswith("layers.")]
    same = sum(a == b for a, b in zip(kept, before.graph.node, strict=True))
    assert same == len(before.graph.node) - 14


def test_the_report_says_what_was_bound(llama: tuple[Path, Path], tmp_path: Path) -> None:
    report = json.loads(insert(llama[1], tmp_path / "out", "--json"))
    assert (report["layers"], report["branches"]) == (2, 14)
    assert report["gates"]["lora_gate.q"] == {"dtype": "float32", "rows": "batch"}
    assert "14 branches in 2 layers" in insert(llama[1], tmp_path / "other")


def test_targets_leave_out_what_is_not_wanted(llama: tuple[Path, Path], tmp_path: Path) -> None:
    insert(llama[1], tmp_path / "out", "--targets", "q,v")
    bank = load_bank(tmp_path / "out")
    assert [b.a for b in bank.branches] == ["lora_a.0.q", "lora_a.0.v", "lora_a.1.q", "lora_a.1.v"]


def test_derived_attach_points_can_be_corrected_and_given_back(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    points = tmp_path / "points.json"
    insert(llama[1], "--write-attach", points)
    document = json.loads(points.read_text())
    for point in document["points"]:
        if point["parts"][0]["projection"] in "qk":  # say the opposite
            swapped = {"q": "k", "k": "q"}[point["parts"][0]["projection"]]
            point["parts"][0]["projection"] = swapped
    points.write_text(json.dumps(document))
    insert(llama[1], tmp_path / "out", "--attach", points)

    bank = load_bank(tmp_path / "out")
    widths = {b.slot: b.n for b in bank.branches if b.layer == 0}
    assert (widths["q"], widths["k"]) == (32, 64)


def test_what_was_written_can_be_inserted_again_from_its_attach_points(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    insert(llama[1], tmp_path / "out")
    insert(llama[1], tmp_path / "again", "--attach", tmp_path / "out" / "attach.json")
    for file in ("model.onnx", "attach.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_a_model_that_takes_adapters_already_is_refused(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    insert(llama[1], tmp_path / "out")
    with pytest.raises(Refused, match=r"lora_gate\.q.*takes adapters already"):
        insert(tmp_path / "out" / "model.onnx", tmp_path / "twice")


def test_an_existing_directory_is_replaced_only_by_force(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    insert(llama[1], tmp_path / "out", "--targets", "q")
    with pytest.raises(Conflict, match="--force"):
        insert(llama[1], tmp_path / "out")
    insert(llama[1], tmp_path / "out", "--force")
    assert len(load_bank(tmp_path / "out").branches) == 14


def test_corrected_attach_points_are_not_overwritten(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "mine.json").write_text("mine")
    with pytest.raises(Conflict, match="--force"):
        insert(llama[1], "--write-attach", tmp_path / "mine.json")
    assert (tmp_path / "mine.json").read_text() == "mine"


def test_wrong_arguments_end_with_usage(llama: tuple[Path, Path], tmp_path: Path) -> None:
    for arguments in (
        [llama[1]],
        [llama[1], tmp_path / "out", "--targets", "q,lm_head"],
        [llama[1], tmp_path / "out", "--targets", ""],
    ):
        result = CliRunner().invoke(build_app(), ["insert-lora", *map(str, arguments)])
        assert result.exit_code == 2, arguments
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"absent\.onnx is no file"):
        insert(tmp_path / "absent.onnx", tmp_path / "out")
    (tmp_path / "text.onnx").write_text("hello, this is no protobuf at all")
    with pytest.raises(InvalidInput, match="no ONNX model"):
        insert(tmp_path / "text.onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()
