"""`--dialect both`: two graphs on one weight file, and everything that takes a bundle takes it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from typer.testing import CliRunner

from remora_build.cli import build_app
from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_build.golden.prompts import Prompt
from remora_build.golden.record import record
from remora_build.graph.layout import lay_out
from remora_contract.bundle import (
    BUNDLE_JSON,
    GRAPH_FILE,
    LEGACY_GRAPH_FILE,
    Bundle,
    load_bundle,
)
from remora_contract.dialects import dialects_in
from remora_contract.errors import ArtifactInvalid, DocumentInvalid, Unsupported
from tests.support.checkpoints import make_checkpoint

DATA = f"{GRAPH_FILE}.data"
FORMS = {"float16": {}, "int4": {"int4_block": 32}, "int8": {"quant": "int8"}}


def run(*arguments: object) -> str:
    result = CliRunner().invoke(build_app(), [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("two") / "checkpoint", "qwen3")


@pytest.fixture(scope="module")
def both(checkpoint: Path) -> Path:
    out = checkpoint.with_name("both")
    run("export", checkpoint, out, "--dialect", "both", "--max-context", 64)
    return out


@pytest.mark.parametrize("form", FORMS)
def test_the_weights_are_stored_once_and_each_graph_is_that_of_its_dialect_alone(
    checkpoint: Path, tmp_path: Path, form: str
):
    sizes = {}
    for dialect in ("native", "legacy", "both"):
        options = ExportOptions(dialect=dialect, max_context=64, golden=False, **FORMS[form])
        sizes[dialect] = export_checkpoint(checkpoint, tmp_path / dialect, options)
    two, native, legacy = (sizes[d] for d in ("both", "native", "legacy"))
    assert two.file(DATA) == native.file(DATA) == legacy.file(DATA)
    assert two.file(GRAPH_FILE) == native.file(GRAPH_FILE)
    second, alone = two.file(LEGACY_GRAPH_FILE), legacy.file(GRAPH_FILE)
    assert second is not None and alone is not None
    assert (second.size, second.digest) == (alone.size, alone.digest)
    assert two.bytes == native.bytes + second.size
    assert two.dialects == ("native", "legacy")
    assert two.base_digest == native.base_digest


def test_a_bundle_of_one_dialect_is_what_it_was(checkpoint: Path, tmp_path: Path):
    options = ExportOptions(max_context=64, golden=False)
    bundle = export_checkpoint(checkpoint, tmp_path / "one", options)
    document = json.loads((tmp_path / "one" / BUNDLE_JSON).read_bytes())
    assert document["format_version"] == 2
    assert bundle.dialects == ("native",)
    assert LEGACY_GRAPH_FILE not in {f["path"] for f in document["files"]}


@pytest.mark.parametrize(
    ("options", "words"),
    [({"quant": "mxfp8"}, "TensorRT 10.3 takes blocks of int4 only; use --dialect native")],
)
def test_weights_that_one_dialect_cannot_hold_are_refused_by_name(
    checkpoint: Path, tmp_path: Path, options: dict[str, str], words: str
):
    with pytest.raises(Unsupported, match=words):
        export_checkpoint(checkpoint, tmp_path / "out", ExportOptions(dialect="both", **options))
    assert not (tmp_path / "out").exists()


def test_a_reader_that_knows_one_graph_is_told_that_the_format_is_another(both: Path):
    """The check that older versions make, on what they are given: no key that they do not know
    comes before it."""
    document = json.loads((both / BUNDLE_JSON).read_bytes())
    assert document["format_version"] == 3
    known = {"dialect", "dtype", "context", "max_bank_rank", "opset", "quant", "adapt", "dora"}
    assert set(document["graph"]) <= known | {"adapter_bias"}
    assert set(document) <= {f.name for f in Bundle.__dataclass_fields__.values()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 2}, "belongs to format version 3"),
        ({"format_version": 5}, "format version 5 is not 2, 3 or 4"),
        ({"files": "without"}, "belongs to format version 3"),
        ({"graph": "legacy"}, "model.onnx beside model.legacy.onnx is legacy"),
    ],
)
def test_a_document_that_contradicts_itself_is_refused(
    both: Path, tmp_path: Path, change: dict[str, object], words: str
):
    document = json.loads((both / BUNDLE_JSON).read_bytes())
    if change.get("files") == "without":
        document["files"] = [f for f in document["files"] if f["path"] != LEGACY_GRAPH_FILE]
    elif change.get("graph") == "legacy":
        document["graph"] |= {"dialect": "legacy", "opset": 20}
    else:
        document |= change
    (tmp_path / BUNDLE_JSON).write_text(json.dumps(document))
    with pytest.raises(DocumentInvalid, match=words):
        load_bundle(tmp_path)


def test_the_golden_prompts_are_those_of_either_graph(both: Path):
    """Recorded again from the legacy graph: the same tokens, logits within float16."""
    bundle = load_bundle(both)
    slots = lay_out(bundle.decoder, bundle.graph)
    golden = json.loads((both / "golden.json").read_bytes())
    legacy = both.with_name("as-legacy")
    legacy.mkdir()
    (legacy / GRAPH_FILE).symlink_to(both / LEGACY_GRAPH_FILE)
    (legacy / DATA).hardlink_to(both / DATA)
    graph = replace(bundle.graph, dialect="legacy", opset=20)
    prompts = [Prompt(tuple(p["tokens"])) for p in golden["prompts"]]
    again = record(legacy, bundle.decoder, graph, slots, prompts, lambda n: None)
    for first, second in zip(golden["prompts"], again.prompts, strict=True):
        assert tuple(first["expected"]) == second.expected
        np.testing.assert_allclose(first["logit"], second.logit, atol=2e-2)


def test_inspect_names_both_graphs_and_verifies_each(both: Path, tmp_path: Path):
    said = run("inspect", both, "--verify")
    assert "native dialect, opset 24" in said and "legacy dialect, opset 20" in said
    damaged = shutil.copytree(both, tmp_path / "damaged")
    with (damaged / LEGACY_GRAPH_FILE).open("r+b") as graph:
        graph.write(b"\0")
    result = CliRunner().invoke(build_app(), ["inspect", str(damaged), "--verify"])
    assert result.exit_code != 0
    error = result.exception
    assert isinstance(error, (ArtifactInvalid, SystemExit))
    assert LEGACY_GRAPH_FILE in f"{result.output}{error}"


def test_published_chunks_are_shared_with_the_bundle_of_one_graph(
    checkpoint: Path, both: Path, tmp_path: Path
):
    native = tmp_path / "native"
    run("export", checkpoint, native, "--dialect", "native", "--max-context", 64)
    repository = tmp_path / "repository"
    run("publish", native, repository, "--revision", "1")
    before = {p for p in repository.rglob("*") if p.is_file()}
    run("publish", both, repository, "--revision", "2")
    new = [p for p in repository.rglob("*") if p.is_file() and p not in before]
    (manifest,) = (p for p in new if "manifests" in p.parts)
    stored = sum(p.stat().st_size for p in new if "cas" in p.parts)
    own = (both / LEGACY_GRAPH_FILE, both / BUNDLE_JSON, manifest)
    assert 0 < stored <= sum(p.stat().st_size for p in own)
    facts = json.loads(manifest.read_bytes())["facts"]
    assert dialects_in(facts) == ("native", "legacy") and facts["dialect"] == "native"


@pytest.mark.parametrize("graph", [GRAPH_FILE, LEGACY_GRAPH_FILE])
def test_insert_lora_takes_either_graph(checkpoint: Path, tmp_path: Path, graph: str):
    bare, out = tmp_path / "bare", tmp_path / "out"
    run(
        "export", checkpoint, bare, "--dialect", "both", "--max-bank-rank", 0,
        "--no-golden", "--max-context", 64,
    )  # fmt: skip
    run("insert-lora", bare / graph, out, "--targets", "o")
    inserted = onnx.load(str(out / "model.onnx"), load_external_data=False)
    assert any(i.name.startswith("lora_a.") for i in inserted.graph.input)
    options = onnxruntime.SessionOptions()
    onnxruntime.InferenceSession(str(out / "model.onnx"), options, ["CPUExecutionProvider"])
